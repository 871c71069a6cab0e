//! The crate `etcd-client`, written by others, against our server: every service, over TLS with client certificates.

use std::fs;
use std::time::Duration;

use etcd_client::{
    AlarmAction, AlarmType, Certificate, Client, Compare, CompareOp, ConnectOptions, DeleteOptions,
    EventType, GetOptions, Identity, LeaseGrantOptions, LeaseTimeToLiveOptions, LockOptions,
    ProclaimOptions, PutOptions, ResignOptions, SortOrder, SortTarget, TlsOptions, Txn, TxnOp,
    TxnOpResponse, WatchOptions,
};

use crate::support::{Endpoint, Options, Subject};

async fn connect(endpoint: &Endpoint) -> Client {
    let files = endpoint.tls.as_ref().expect("a TLS endpoint");
    let read = |path| fs::read(path).expect("a file that the server wrote");
    let tls = TlsOptions::new()
        .ca_certificate(Certificate::from_pem(read(&files.ca)))
        .identity(Identity::from_pem(read(&files.certificate), read(&files.key)));
    let options = ConnectOptions::new()
        .with_tls(tls)
        .with_timeout(Duration::from_secs(15))
        .with_require_leader(true);
    Client::connect([endpoint.url()], Some(options)).await.unwrap()
}

/// Runs a test with a client of a server of its own.
fn with_client<F: Future<Output = ()>>(test: impl FnOnce(Client) -> F) {
    let subject = Subject::start(&Options { tls: true, ..Default::default() });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { test(connect(subject.endpoint()).await).await });
}

#[test]
fn kv() {
    with_client(|mut client| async move {
        client.put("a", "1", None).await.unwrap();
        let reply = client.put("a", "2", Some(PutOptions::new().with_prev_key())).await.unwrap();
        assert_eq!(reply.prev_key().unwrap().value(), b"1");
        client.put("b", "3", None).await.unwrap();
        let options = GetOptions::new()
            .with_all_keys()
            .with_sort(SortTarget::Key, SortOrder::Descend)
            .with_limit(1);
        let reply = client.get("", Some(options)).await.unwrap();
        assert_eq!((reply.count(), reply.more()), (2, true));
        assert_eq!(reply.kvs()[0].key(), b"b");
        let reply = client.get("a", Some(GetOptions::new().with_revision(2))).await.unwrap();
        assert_eq!(reply.kvs()[0].value(), b"1");
        assert_eq!(reply.header().unwrap().revision(), 4);

        let txn = Txn::new()
            .when([Compare::value("a", CompareOp::Equal, "2")])
            .and_then([
                TxnOp::put("c", "4", None),
                TxnOp::txn(Txn::new().and_then([TxnOp::get("c", None)])),
            ])
            .or_else([TxnOp::delete("a", None)]);
        let reply = client.txn(txn).await.unwrap();
        assert!(reply.succeeded());
        let responses = reply.op_responses();
        let [TxnOpResponse::Put(_), TxnOpResponse::Txn(inner)] = responses.as_slice() else {
            panic!("{responses:?}");
        };
        let inner = inner.op_responses();
        assert!(matches!(&inner[..], [TxnOpResponse::Get(get)] if get.kvs()[0].value() == b"4"));

        let options = DeleteOptions::new().with_all_keys().with_prev_key();
        let reply = client.delete("", Some(options)).await.unwrap();
        assert_eq!((reply.deleted(), reply.prev_kvs().len()), (3, 3));
        client.compact(5, None).await.unwrap();
        let old = client.get("a", Some(GetOptions::new().with_revision(4))).await;
        assert!(old.unwrap_err().to_string().contains("required revision has been compacted"));
    });
}

#[test]
fn watch() {
    with_client(|mut client| async move {
        client.put("w1", "1", None).await.unwrap();
        let options = WatchOptions::new().with_prefix().with_start_revision(2).with_prev_key();
        let mut stream = client.watch("w", Some(options)).await.unwrap();
        let mut events = Vec::new();
        client.put("w1", "2", None).await.unwrap();
        client.delete("w1", None).await.unwrap();
        while events.len() < 3 {
            let reply = stream.message().await.unwrap().unwrap();
            events.extend(reply.events().to_vec());
        }
        let kinds: Vec<_> = events.iter().map(etcd_client::Event::event_type).collect();
        assert_eq!(kinds, [EventType::Put, EventType::Put, EventType::Delete]);
        assert_eq!(events[1].prev_kv().unwrap().value(), b"1");
        stream.request_progress().await.unwrap();
        let reply = stream.message().await.unwrap().unwrap();
        assert_eq!((reply.watch_id(), reply.header().unwrap().revision()), (-1, 4));
        stream.cancel(0).await.unwrap();
        while !stream.message().await.unwrap().unwrap().canceled() {}
    });
}

#[test]
fn lease() {
    with_client(|mut client| async move {
        let options = LeaseGrantOptions::new().with_id(77);
        let reply = client.lease_grant(100, Some(options)).await.unwrap();
        assert_eq!((reply.id(), reply.ttl()), (77, 100));
        client.put("leased", "1", Some(PutOptions::new().with_lease(77))).await.unwrap();
        let (mut keeper, mut stream) = client.lease_keep_alive(77).await.unwrap();
        for _ in 0..3 {
            keeper.keep_alive().await.unwrap();
            assert_eq!(stream.message().await.unwrap().unwrap().ttl(), 100);
        }
        let options = LeaseTimeToLiveOptions::new().with_keys();
        let reply = client.lease_time_to_live(77, Some(options)).await.unwrap();
        assert_eq!(reply.keys(), [b"leased".to_vec()]);
        assert_eq!(client.leases().await.unwrap().leases().len(), 1);
        client.lease_revoke(77).await.unwrap();
        assert_eq!(client.get("leased", None).await.unwrap().count(), 0);
        assert!(client.lease_revoke(77).await.is_err());
    });
}

#[test]
fn lock_and_election() {
    with_client(|mut client| async move {
        client.lease_grant(100, Some(LeaseGrantOptions::new().with_id(7))).await.unwrap();
        let options = LockOptions::new().with_lease(7);
        let reply = client.lock("printer", Some(options)).await.unwrap();
        assert_eq!(reply.key(), b"printer/7");
        client.unlock(reply.key()).await.unwrap();

        let mut reply = client.campaign("boss", "me", 7).await.unwrap();
        let leader = reply.take_leader().unwrap();
        let mut observed = client.observe("boss").await.unwrap();
        let first = observed.message().await.unwrap().unwrap();
        assert_eq!(first.kv().unwrap().value(), b"me");
        let options = ProclaimOptions::new().with_leader(leader.clone());
        client.proclaim("still me", Some(options)).await.unwrap();
        let second = observed.message().await.unwrap().unwrap();
        assert_eq!(second.kv().unwrap().value(), b"still me");
        assert_eq!(client.leader("boss").await.unwrap().kv().unwrap().value(), b"still me");
        client.resign(Some(ResignOptions::new().with_leader(leader))).await.unwrap();
        assert!(client.leader("boss").await.is_err());
    });
}

#[test]
fn maintenance_and_cluster() {
    with_client(|mut client| async move {
        client.put("a", "1", None).await.unwrap();
        let status = client.status().await.unwrap();
        assert!(status.version().starts_with("3."));
        assert!(0 < status.db_size());
        let alarms = client.alarm(AlarmAction::Get, AlarmType::None, None).await.unwrap();
        assert!(alarms.alarms().is_empty());
        client.defragment().await.unwrap();
        client.hash().await.unwrap();
        client.hash_kv(0).await.unwrap();
        let mut snapshot = client.snapshot().await.unwrap();
        let mut bytes = 0;
        while let Some(part) = snapshot.message().await.unwrap() {
            bytes += part.blob().len();
        }
        assert_eq!(bytes % 512, 32);
        let members = client.member_list().await.unwrap();
        let [member] = members.members() else { panic!("{members:?}") };
        assert_eq!(member.id(), status.leader());
        assert!(client.member_remove(1234).await.is_err());
        assert!(client.member_promote(1234).await.is_err());
        client.move_leader(member.id()).await.unwrap();
    });
}

#[test]
fn auth_is_off() {
    with_client(|mut client| async move {
        let refused = client.auth_enable().await.unwrap_err();
        assert!(refused.to_string().contains("root user does not exist"), "{refused}");
        assert!(client.user_list().await.unwrap().users().is_empty());
        assert!(client.role_list().await.unwrap().roles().is_empty());
    });
}
