//! The faults that can be planted, if this build can.

/// Plants a fault by its name.
#[cfg(feature = "mutants")]
pub(crate) fn plant(name: &str) -> Result<(), String> {
    use k3s_server::mutants::{Mutant, plant};
    let mutant = Mutant::ALL.iter().find(|mutant| mutant.name() == name);
    mutant.map(|mutant| plant(*mutant)).ok_or_else(|| format!("no fault is called {name}"))
}

/// Plants a fault by its name.
#[cfg(not(feature = "mutants"))]
pub(crate) fn plant(_name: &str) -> Result<(), String> {
    Err(MISSING.to_owned())
}

/// What to say where faults cannot be planted.
pub(crate) const MISSING: &str =
    "this build has no planted faults: `make sim-mutants` makes one that has";

/// Their names; none if this build has none.
pub(crate) fn names() -> Vec<&'static str> {
    let all = k3s_server::mutants::Mutant::ALL.iter().map(|mutant| mutant.name());
    if cfg!(feature = "mutants") { all.collect() } else { Vec::new() }
}
