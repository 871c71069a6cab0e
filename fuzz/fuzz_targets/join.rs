//! The target `join` of tests/fuzz under libFuzzer.
#![no_main]

#[path = "../../tests/fuzz/targets/mod.rs"]
#[allow(dead_code, reason = "one target of all")]
mod targets;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    for target in targets::ALL.iter().filter(|target| target.name == "join") {
        (target.run)(input);
    }
});
