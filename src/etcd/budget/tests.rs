//! Waiting for room, giving up, and connections that lose theirs. What fits is tested in `core`.

use std::future::Future;
use std::pin::pin;
use std::task::Poll;

use futures_util::poll;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::transport::server::Connected as _;

use super::*;
use crate::env::host;
use crate::etcd::intake::Intake;

const LIMITS: Limits = Limits { total: 64 << 10, account: 16 << 10, account_min: 0 };

fn budget() -> Budget {
    Budget::with_limits(host::env().clock, LIMITS, true)
}

async fn take(account: &Account, bytes: u64) -> Permit {
    account.reserve(bytes, None).await.unwrap()
}

async fn waits(future: impl Future) -> bool {
    poll!(pin!(future)).is_pending()
}

fn soon(budget: &Budget, seconds: u64) -> Option<Instant> {
    Some(budget.0.clock.now() + Duration::from_secs(seconds))
}

#[tokio::test]
async fn room_is_waited_for_until_somebody_gives_it_back() {
    let budget = budget();
    let account = budget.open();
    let first = take(&account, 16 << 10).await;
    let mut second = Box::pin(account.reserve(1 << 10, None));
    assert!(poll!(&mut second).is_pending());

    drop(first);

    let second = second.await.unwrap();
    assert_eq!(budget.used(), 1 << 10);
    drop(second);
    assert_eq!(budget.used(), 0);
}

#[tokio::test(start_paused = true)]
async fn wait_ends_with_its_deadline() {
    let budget = budget();
    let account = budget.open();
    let held = take(&account, 16 << 10).await;

    let refused = account.reserve(1, soon(&budget, 7)).await;

    assert_eq!(refused.map(drop), Err(EtcdError::TooManyRequests));
    drop(held);
    assert!(account.reserve(1, soon(&budget, 7)).await.is_ok());
    assert_eq!(budget.used(), 0);
}

#[tokio::test]
async fn wait_that_is_abandoned_leaves_nothing_behind_even_when_it_was_just_granted() {
    let budget = budget();
    let account = budget.open();
    let first = take(&account, 16 << 10).await;
    assert!(waits(account.reserve(4, None)).await);
    assert!(budget.lock().waiting.is_empty());

    let mut granted = Box::pin(account.reserve(5, None));
    assert!(poll!(&mut granted).is_pending());
    drop(first);
    assert_eq!(budget.used(), 5);
    drop(granted);
    assert_eq!(budget.used(), 0);
}

#[tokio::test]
async fn everybody_who_waits_hears_that_the_server_stops() {
    let budget = budget();
    let account = budget.open();
    let _held = take(&account, 16 << 10).await;
    let mut waiting = Box::pin(account.reserve(1, None));
    assert!(poll!(&mut waiting).is_pending());

    budget.close();

    assert_eq!(waiting.await.map(drop), Err(EtcdError::Stopped));
    assert_eq!(budget.open().reserve(1, None).await.map(drop), Err(EtcdError::Stopped));
}

#[tokio::test]
async fn settled_permit_gives_back_what_is_too_much_and_owes_what_is_too_little() {
    let budget = budget();
    let account = budget.open();
    let mut permit = take(&account, 10 << 10).await;
    permit.settle(1 << 10);
    assert_eq!(budget.used(), 1 << 10);
    permit.settle(20 << 10);
    assert!(waits(account.reserve(1, None)).await);
    assert!(!permit.grow(30 << 10) || matches!(permit.hold, Some(Hold::Large)));
    drop(permit);
    assert_eq!(budget.used(), 0);
}

/// A pipe as a connection: the far end, and the near one as the server sees it.
fn connection(budget: &Budget) -> (tokio::io::DuplexStream, Observed<tokio::io::DuplexStream>) {
    let (far, near) = tokio::io::duplex(1 << 20);
    let lane = Intake::new(&host::env().clock).open();
    (far, Observed::new(near, budget.open(), lane))
}

/// Takes what it can get.
async fn hog(account: &Account) -> Vec<Permit> {
    let mut permits = Vec::new();
    while let Poll::Ready(permit) = poll!(pin!(account.reserve(4 << 10, None))) {
        permits.push(permit.unwrap());
    }
    permits
}

#[tokio::test(start_paused = true)]
async fn connection_that_takes_nothing_is_ended_when_others_wait_and_not_before() {
    let budget = budget();
    let mut deaf = Vec::new();
    for _ in 0..5 {
        let (far, mut near) = connection(&budget);
        let permits = hog(&near.connect_info().account).await;
        deaf.push(tokio::spawn(async move {
            // Its answers go with it.
            let error = near.read_u8().await.unwrap_err();
            drop((permits, far));
            error.kind()
        }));
    }
    let (far, mut near) = connection(&budget);
    let slow = tokio::spawn(async move {
        let _held = take(&near.connect_info().account, 1).await;
        loop {
            tokio::select! {
                ended = near.read_u8() => return ended,
                () = tokio::time::sleep(STALLED / 2) => near.write_all(&[0; 4 << 10]).await.unwrap(),
            }
        }
    });
    tokio::time::sleep(STALLED * 3).await;
    assert!(deaf.iter().all(|one| !one.is_finished()), "nobody waited, nobody was in the way");

    let start = budget.0.clock.now();
    let got = budget.open().reserve(16 << 10, soon(&budget, 7)).await;

    assert!(got.is_ok());
    let waited = budget.0.clock.now() - start;
    assert!(waited <= PATIENCE * 2, "{waited:?}");
    for one in deaf {
        assert_eq!(one.await.unwrap(), std::io::ErrorKind::ConnectionAborted);
    }
    assert!(!slow.is_finished(), "a slow client is not a deaf one");
    slow.abort();
    drop(far);
}

/// Its own answers are its own business.
#[tokio::test(start_paused = true)]
async fn connection_that_only_stands_in_its_own_way_is_left_alone() {
    let budget = budget();
    let (_far, mut near) = connection(&budget);
    let account = near.connect_info().account;
    let _permits = hog(&account).await;
    let refused = account.reserve(1, soon(&budget, 60)).await;
    assert_eq!(refused.map(drop), Err(EtcdError::TooManyRequests));
    assert!(waits(near.read_u8()).await);
}

#[tokio::test]
async fn server_that_stops_ends_every_connection() {
    let budget = budget();
    let (_far, mut near) = connection(&budget);
    budget.end_connections();
    assert!(near.read_u8().await.is_err());
}
