//! Stands before every service: refuses whoever is out, and what this node may not answer now; words transport errors as etcd does.
//!
//! A client certificate belongs to the server that made it. With that server removed it opens nothing any more, on any member: who
//! takes a card out of the cluster because it is lost means what is on it, too.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, StatusCode};
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};

use super::answer;
use super::api::Api;
use super::budget::Account;
use super::error::EtcdError;
use super::intake;
use crate::apply;
use crate::pki::Caller;
use crate::raft::Role;
use crate::types::NodeId;

/// Metadata by which a client says that it wants no answer from a member without a leader.
const NEEDS_LEADER: &str = "hasleader";

/// Elections without a leader before streams that need one are ended. Reconnecting is dear, so not at the first.
const ELECTIONS_WITHOUT_LEADER: u32 = 3;

/// Services that are etcd's own; health and reflection answer always.
const SERVICES: [&str; 3] = ["/etcdserverpb.", "/v3lockpb.", "/v3electionpb."];

/// The one service whose code is not ours and whose answers are large: all descriptors of a file and what it imports.
const REFLECTION: &str = "/grpc.reflection.";
const REFLECTION_BYTES: u64 = 256 << 10;

/// What a learner answers. A range only if it is serializable, which is checked where it is read.
const LEARNER_METHODS: [&str; 3] = [
    "/etcdserverpb.Maintenance/Status",
    "/etcdserverpb.Maintenance/Snapshot",
    "/etcdserverpb.KV/Range",
];

/// Whether the client needs a leader.
pub(super) fn needs_leader(metadata: &MetadataMap) -> bool {
    metadata.get(NEEDS_LEADER).is_some_and(|value| value == "true")
}

/// The middleware.
pub(super) async fn gate(State(api): State<Api>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if !is_grpc(request.headers()) && !super::http::PATHS.contains(&path) {
        return (StatusCode::NOT_FOUND, "404 page not found\n").into_response();
    }
    let owner = request.extensions().get::<Caller>().and_then(|caller| caller.identity);
    if let Some(why) = owner.and_then(|owner| removed(&api, owner.node)) {
        let text = format!("certificate refused, its server is no member any more: {why}");
        return if is_grpc(request.headers()) {
            Status::permission_denied(text).into_http::<tonic::body::Body>().into_response()
        } else {
            (StatusCode::FORBIDDEN, format!("{text}\n")).into_response()
        };
    }
    if let Err(error) = admit(&api, request.uri().path(), request.headers()) {
        return refusal(error);
    }
    let path = request.uri().path().to_owned();
    let reflection = path.starts_with(REFLECTION);
    let room = match request.extensions().get::<Account>() {
        Some(account) if reflection => {
            let deadline = api.own_deadline();
            match account.reserve(REFLECTION_BYTES, Some(deadline)).await {
                Ok(room) => Some(room),
                Err(error) => return refusal(error),
            }
        }
        Some(_) | None => None,
    };
    let (request, taken_in) = intake::meter(&api, request);
    let mut response = next.run(request).await;
    // A unary call is carried out; a stream keeps its own.
    drop(taken_in);
    word_as_etcd(response.headers_mut(), &path);
    match room {
        Some(room) => answer::charge_body(response, room),
        None => answer::unwrap_body(response),
    }
}

/// Why a node was removed for ever, if it was, as far as this node knows. A member's own record is not looked up.
fn removed(api: &Api, node: NodeId) -> Option<String> {
    if api.status().members.iter().any(|member| member.id == node) {
        return None;
    }
    // A store that cannot be read serves nothing, and stops the node by its own channel.
    let record = api.parts().node.store().read().and_then(|view| apply::node(&view, node));
    record.ok().flatten().filter(|record| record.retired).map(|record| record.retired_reason)
}

fn refusal(error: EtcdError) -> Response {
    Status::from(error).into_http::<tonic::body::Body>().into_response()
}

fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| kind.starts_with("application/grpc"))
}

fn admit(api: &Api, path: &str, headers: &HeaderMap) -> Result<(), EtcdError> {
    if !SERVICES.iter().any(|service| path.starts_with(service)) {
        return Ok(());
    }
    let status = api.status();
    if status.role == Role::Learner && !LEARNER_METHODS.contains(&path) {
        return Err(EtcdError::NotSupportedForLearner);
    }
    let needs_leader = headers.get(NEEDS_LEADER).is_some_and(|value| value == "true");
    if needs_leader && status.leader.is_none() {
        return Err(EtcdError::NoLeader);
    }
    Ok(())
}

/// Completes when there has been no leader for three elections.
pub(super) async fn leader_lost(api: &Api) {
    let patience = api.settings().election_timeout * ELECTIONS_WITHOUT_LEADER;
    let mut status = api.watch_status();
    loop {
        if status.wait_for(|status| status.leader.is_none()).await.is_err() {
            return;
        }
        tokio::select! {
            () = api.parts().env.clock.sleep(patience) => return,
            found = status.wait_for(|status| status.leader.is_some()) => {
                if found.is_err() {
                    return;
                }
            }
        }
    }
}

/// What our library says of a call before a service sees it, in the words of grpc-go, and so of etcd.
fn word_as_etcd(headers: &mut HeaderMap, path: &str) {
    let Some(status) = Status::from_header_map(headers) else { return };
    let worded =
        too_large(&status).or_else(|| unreadable(&status, path)).or_else(|| unknown(&status, path));
    if let Some(worded) = worded {
        let mut replaced = HeaderMap::new();
        if worded.add_header(&mut replaced).is_ok() {
            headers.extend(replaced);
        }
    }
}

/// The status for a message that is not one, if that is what this one says. Only transactions can be nested deeper
/// than is decoded, and how deep they may be is counted in operations.
fn unreadable(status: &Status, path: &str) -> Option<Status> {
    const TXN: &str = "/etcdserverpb.KV/Txn";
    if status.code() != Code::Internal {
        return None;
    }
    let what = status.message().strip_prefix("failed to decode Protobuf message: ")?;
    if path == TXN && what.ends_with("recursion limit reached") {
        return Some(EtcdError::TooManyOps.into());
    }
    Some(Status::internal(format!("grpc: error unmarshalling request: {what}")))
}

/// The status for a method that nobody has, if that is what this one says: then it says no more.
fn unknown(status: &Status, path: &str) -> Option<Status> {
    const OURS: [&str; 8] = [
        "etcdserverpb.KV",
        "etcdserverpb.Watch",
        "etcdserverpb.Lease",
        "etcdserverpb.Cluster",
        "etcdserverpb.Maintenance",
        "etcdserverpb.Auth",
        "v3lockpb.Lock",
        "v3electionpb.Election",
    ];
    if status.code() != Code::Unimplemented || !status.message().is_empty() {
        return None;
    }
    let (service, method) = path.strip_prefix('/')?.rsplit_once('/')?;
    let text = if OURS.contains(&service) {
        format!("unknown method {method} for service {service}")
    } else {
        format!("unknown service {service}")
    };
    Some(Status::unimplemented(text))
}

/// The status for a message above the limit, if that is what this one says.
pub(super) fn too_large(status: &Status) -> Option<Status> {
    if status.code() != Code::OutOfRange {
        return None;
    }
    let rest = status.message().strip_prefix("Error, decoded message length too large: found ")?;
    let (found, rest) = rest.split_once(" bytes, the limit is: ")?;
    let limit = rest.strip_suffix(" bytes")?;
    let text = format!("grpc: received message larger than max ({found} vs. {limit})");
    Some(Status::resource_exhausted(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oversized_message_is_refused_in_grpc_gos_words() {
        let ours = Status::out_of_range(
            "Error, decoded message length too large: found 3000000 bytes, the limit is: 2097152 bytes",
        );
        let mut headers = HeaderMap::new();
        ours.add_header(&mut headers).unwrap();
        word_as_etcd(&mut headers, "/etcdserverpb.KV/Put");
        let worded = Status::from_header_map(&headers).unwrap();
        assert_eq!(worded.code(), Code::ResourceExhausted);
        assert_eq!(
            worded.message(),
            "grpc: received message larger than max (3000000 vs. 2097152)"
        );
    }

    #[test]
    fn message_that_is_none_is_refused_in_grpc_gos_words() {
        let said =
            Status::internal("failed to decode Protobuf message: PutRequest.key: buffer underflow");
        let worded = unreadable(&said, "/etcdserverpb.KV/Put").unwrap();
        assert_eq!(worded.code(), Code::Internal);
        assert_eq!(
            worded.message(),
            "grpc: error unmarshalling request: PutRequest.key: buffer underflow"
        );
        assert!(unreadable(&Status::internal("etcdserver: x"), "/etcdserverpb.KV/Put").is_none());
    }

    #[test]
    fn transaction_nested_too_deep_to_decode_has_too_many_operations() {
        let said = Status::internal(
            "failed to decode Protobuf message: TxnRequest.success: recursion limit reached",
        );
        let worded = unreadable(&said, "/etcdserverpb.KV/Txn").unwrap();
        assert_eq!(worded.code(), Code::InvalidArgument);
        assert_eq!(worded.message(), "etcdserver: too many operations in txn request");
    }

    #[test]
    fn methods_nobody_has_are_named() {
        let text = |path| unknown(&Status::unimplemented(""), path).unwrap().message().to_owned();
        assert_eq!(text("/etcdserverpb.KV/No"), "unknown method No for service etcdserverpb.KV");
        assert_eq!(text("/x.Y/No"), "unknown service x.Y");
        let said = Status::unimplemented("range stream: custom sort");
        assert!(unknown(&said, "/etcdserverpb.KV/RangeStream").is_none());
    }

    #[test]
    fn other_statuses_pass_unchanged() {
        let compacted = Status::from(EtcdError::Compacted);
        assert!(too_large(&compacted).is_none());
        let mut headers = HeaderMap::new();
        compacted.add_header(&mut headers).unwrap();
        let before = headers.clone();
        word_as_etcd(&mut headers, "/etcdserverpb.KV/Put");
        assert_eq!(headers, before);
    }
}
