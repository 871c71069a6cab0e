//! Asks for room before an answer grows, so that a read of the whole store need not be in memory to be refused.

/// Where an answer is put together.
pub trait Room {
    /// Whether there is room for so many bytes more. After a "no" the answer is dropped.
    fn keep(&self, bytes: usize) -> bool;
}

/// Room without end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unbounded;

impl Room for Unbounded {
    fn keep(&self, _bytes: usize) -> bool {
        true
    }
}
