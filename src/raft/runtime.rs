//! The runtime openraft runs on: tokio's, with chance that a test can fix.
//!
//! openraft draws its election timeouts from its runtime's generator. A simulation that is to repeat itself from one
//! seed calls [`seed_this_thread`]; everybody else gets numbers from the kernel.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use openraft::OptionalSend;
use openraft::impls::TokioRuntime;
use openraft::rt::AsyncRuntime;
use rand_core::TryRng;

thread_local! {
    /// The state of this thread's generator, once it was seeded.
    static SEEDED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// From now on, what openraft decides by chance on this thread follows from `seed`.
#[cfg(any(test, feature = "testkit"))]
pub fn seed_this_thread(seed: u64) {
    SEEDED.set(Some(seed));
}

/// openraft's source of chance.
#[derive(Clone, Copy, Debug)]
pub struct Chance;

impl Chance {
    /// splitmix64 on a seeded thread, the kernel elsewhere.
    fn draw() -> u64 {
        if let Some(state) = SEEDED.get() {
            let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            SEEDED.set(Some(state));
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            return mixed ^ (mixed >> 31);
        }
        match getrandom::u64() {
            Ok(number) => number,
            Err(error) => unreachable!("the kernel has no random numbers: {error}"),
        }
    }
}

impl TryRng for Chance {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let [a, b, c, d, ..] = Self::draw().to_le_bytes();
        Ok(u32::from_le_bytes([a, b, c, d]))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(Self::draw())
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&Self::draw().to_le_bytes()[..chunk.len()]);
        }
        Ok(())
    }
}

/// See the module documentation.
#[derive(Debug)]
pub struct Runtime(TokioRuntime);

impl AsyncRuntime for Runtime {
    type JoinError = <TokioRuntime as AsyncRuntime>::JoinError;
    type JoinHandle<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::JoinHandle<T>;
    type Sleep = <TokioRuntime as AsyncRuntime>::Sleep;
    type Instant = <TokioRuntime as AsyncRuntime>::Instant;
    type TimeoutError = <TokioRuntime as AsyncRuntime>::TimeoutError;
    type Timeout<R, T: Future<Output = R> + OptionalSend> =
        <TokioRuntime as AsyncRuntime>::Timeout<R, T>;
    type ThreadLocalRng = Chance;
    type Mpsc = <TokioRuntime as AsyncRuntime>::Mpsc;
    type Watch = <TokioRuntime as AsyncRuntime>::Watch;
    type Oneshot = <TokioRuntime as AsyncRuntime>::Oneshot;
    type Mutex<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::Mutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        TokioRuntime::spawn(future)
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        TokioRuntime::sleep(duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        TokioRuntime::sleep_until(deadline)
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(
        duration: Duration,
        future: F,
    ) -> Self::Timeout<R, F> {
        TokioRuntime::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(
        deadline: Self::Instant,
        future: F,
    ) -> Self::Timeout<R, F> {
        TokioRuntime::timeout_at(deadline, future)
    }

    fn is_panic(join_error: &Self::JoinError) -> bool {
        TokioRuntime::is_panic(join_error)
    }

    fn thread_rng() -> Chance {
        Chance
    }

    fn new(threads: usize) -> Self {
        Self(TokioRuntime::new(threads))
    }

    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        self.0.block_on(future)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn numbers() -> Vec<u64> {
        (0..8).map(|_| Chance::draw()).collect()
    }

    #[test]
    fn a_seeded_thread_repeats_itself_and_another_does_not() {
        let of_seed = |seed| {
            let run = move || {
                seed_this_thread(seed);
                numbers()
            };
            thread::spawn(run).join().unwrap()
        };
        assert_eq!(of_seed(7), of_seed(7));
        assert_ne!(of_seed(7), of_seed(8));
        assert_ne!(thread::spawn(numbers).join().unwrap(), thread::spawn(numbers).join().unwrap());
    }

    #[test]
    fn every_byte_of_a_buffer_is_drawn() {
        let (mut first, mut second) = ([0; 13], [0; 13]);
        seed_this_thread(1);
        for buffer in [&mut first, &mut second] {
            assert_eq!(Chance.try_fill_bytes(buffer), Ok(()));
        }
        assert!(first.iter().zip(&second).filter(|(a, b)| a != b).count() > 8);
        let (small, large) = (Chance.try_next_u32().unwrap(), Chance.try_next_u64().unwrap());
        assert_ne!(u64::from(small), large);
    }
}
