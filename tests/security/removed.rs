//! A server that was removed: whoever has its card has nothing any more.

use std::time::{Duration, Instant};

use bytes::Bytes;
use k3s_server::env::host;
use k3s_server::peers::{Passport, Peers};
use k3s_server::pki::{Identity, Names, Owner, Pki};
use k3s_server::proto::node::{HelloReply, HelloRequest, Member as WireMember};
use k3s_server::raft::Member;
use k3s_server::raft::transport::{CallError, Method, Refused, StreamMethod, Transport};
use prost::Message;
use tokio::task::JoinSet;
use tonic::Code;

use crate::client;
use crate::servers::{LONG, Server, Servers, serves};
use crate::support::certificates::{from_files, uri};
use crate::table::every_rpc;

const SOON: Duration = Duration::from_secs(20);

fn identity(server: &Server) -> Identity {
    uri(&server.tls_dir(), "peer").parse().unwrap()
}

/// A member as others have it on record.
fn member(server: &Server) -> Member {
    Member {
        id: identity(server).node,
        name: server.name.clone(),
        peer_urls: vec![format!("https://{}", server.door(2380))],
        ..Member::default()
    }
}

/// What a server with this one's files can call the others with.
async fn voice_of(server: &Server) -> Peers {
    let env = host::env();
    let Identity { cluster, node, .. } = identity(server);
    let owner = Owner { cluster, node };
    let names = Names::loopback();
    let (pki, _) = Pki::establish(&env, &server.tls_dir(), owner, &names).await.unwrap();
    let passport = Passport::new(cluster, 1_000, &*env.entropy);
    Peers::new(pki, passport, &member(server), env.entropy)
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_a_removed_server_open_nothing() {
    let mut servers = Servers::three("");
    let mut removed = servers.all.pop().unwrap();
    // A client that was there before.
    let files = removed.endpoint().tls.unwrap();
    let shown = || client::tls_with(&files, from_files(&removed.tls_dir(), "client"));
    let first = &servers.all[0];
    let early = client::channel_with(&first.door(2379), Some(shown())).await.unwrap();
    serves(early.clone(), "before").await.unwrap();

    let output = first.run(&["member", "remove", "--yes", &removed.name]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    for server in &servers.all {
        let door = server.door(2379);
        let channel = client::channel_with(&door, Some(shown())).await.unwrap();
        let health = "/grpc.health.v1.Health/Check";
        let until = Instant::now() + LONG;
        while client::call(&channel, health, Bytes::new()).await.is_ok() {
            assert!(Instant::now() < until, "{} still lets it in", server.name);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut calls = JoinSet::new();
        for path in every_rpc() {
            let channel = channel.clone();
            calls.spawn(async move {
                let refused = client::call(&channel, &path, Bytes::new()).await.unwrap_err();
                assert_eq!(refused.code(), Code::PermissionDenied, "{path}: {refused}");
                assert!(refused.message().contains("its server is no member"), "{path}: {refused}");
            });
        }
        calls.join_all().await;
    }
    let refused = serves(early, "after").await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    removed.kill();
    nobody_hears(&removed, &servers.all).await;

    serves(first.channel().await, "still").await.unwrap();
    servers.stop();
}

async fn nobody_hears(removed: &Server, others: &[Server]) {
    let voice = voice_of(removed).await;
    for other in others {
        let to = member(other);
        for method in Method::ALL {
            if [Method::Hello, Method::Admit].contains(method) {
                continue;
            }
            let answer = voice.call(&to, *method, Bytes::new(), SOON).await;
            assert!(
                matches!(answer, Err(CallError::Refused(Refused::Removed(_)))),
                "{method:?} to {}: {answer:?}",
                other.name
            );
        }
        for method in StreamMethod::ALL {
            let requests = Box::pin(tokio_stream::iter([Bytes::from_static(b"x")]));
            let answer = voice.stream(&to, *method, requests).await;
            let refused = answer.err();
            assert!(
                matches!(refused, Some(CallError::Refused(Refused::Removed(_)))),
                "{method:?} to {}: {refused:?}",
                other.name
            );
        }
        // It may ask who it is, and hears that it is out.
        let own = identity(removed);
        let hello = HelloRequest {
            cluster: own.cluster.get(),
            epoch: 1_000,
            incarnation: 1,
            wire_version_min: 1,
            wire_version_max: 1,
            self_: Some(WireMember { id: own.node.get(), ..WireMember::default() }),
            ..HelloRequest::default()
        };
        let hello = hello.encode_to_vec().into();
        let reply = voice.call(&to, Method::Hello, hello, SOON).await.unwrap();
        assert!(HelloReply::decode(reply).unwrap().retired);
    }
}
