//! Runs one test again in a process of its own, for what a process has only one of.
//!
//! The environment, the mounts and the logger of a process cannot be changed while other tests run beside. So the test starts
//! its own binary with its own name as the filter, in the surroundings it wants, and does its work there:
//!
//! ```ignore
//! const TEST: &str = concat!(module_path!(), "::name_of_this_test");
//! if !rerun::is_child(TEST) {
//!     rerun::pass(TEST, rerun::this_binary().env("NOTIFY_SOCKET", path));
//!     return;
//! }
//! ```

use std::process::Command;

/// Tells the child which test it is.
const MARK: &str = "K3S_SERVER_TEST_CHILD";

/// Whether this process was started to run this very test.
pub fn is_child(test: &str) -> bool {
    std::env::var_os(MARK).is_some_and(|name| name == test)
}

/// The running test binary.
pub fn this_binary() -> Command {
    match std::env::current_exe() {
        Ok(path) => Command::new(path),
        Err(error) => panic!("the test binary cannot be found: {error}"),
    }
}

/// Runs `test`, a path that begins with the crate, with `command`, which starts the test binary in its own way, and
/// returns what it left on stderr. Panics unless the test ran and passed.
pub fn pass(test: &str, command: &mut Command) -> String {
    let filter = test.split_once("::").map_or(test, |(_, path)| path);
    command.args([filter, "--exact", "--nocapture", "--test-threads=1"]).env(MARK, test);
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => panic!("{command:?} cannot be run: {error}"),
    };
    let said = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    // A filter that matches nothing is a success too, as far as the exit code goes.
    assert!(
        output.status.success() && said.contains("test result: ok. 1 passed"),
        "{test} did not pass in its own process: {}\n{said}{stderr}",
        output.status
    );
    stderr
}
