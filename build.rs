//! Compiles `proto/*.proto` to Rust, without needing an installed protoc.

use std::error::Error;
use std::path::PathBuf;

use prost::Message;

const FILES: &[&str] =
    &["kv.proto", "auth.proto", "rpc.proto", "lock.proto", "election.proto", "node.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("etcd_descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().build_client(true).bytes(".").compile_fds(descriptors)?;
    Ok(())
}
