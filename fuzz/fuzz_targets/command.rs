//! The target `command` of tests/fuzz/targets.rs under libFuzzer.
#![no_main]

#[path = "../../tests/fuzz/targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    for target in targets::ALL.iter().filter(|target| target.name == "command") {
        (target.run)(input);
    }
});
