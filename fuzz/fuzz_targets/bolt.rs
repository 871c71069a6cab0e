//! The target `bolt` of tests/fuzz/targets.rs under libFuzzer.
#![no_main]

#[path = "../../tests/fuzz/targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    for target in targets::ALL.iter().filter(|target| target.name == "bolt") {
        (target.run)(input);
    }
});
