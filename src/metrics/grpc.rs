//! Counts gRPC calls per method, under the names of the Go gRPC middleware that etcd uses.
//!
//! The methods are a fixed table: a client that calls made-up paths cannot create time series. A method's
//! handles are made at its first call and found by one hash lookup afterwards.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::histogram::Durations;

/// Streams in neither direction.
const UNARY: &str = "unary";
/// The server answers with a stream.
const SERVER_STREAM: &str = "server_stream";
/// Streams in both directions.
const BIDI_STREAM: &str = "bidi_stream";

/// Every method served on the client port. A test holds it against the compiled protocol.
const METHODS: &[(&str, &[(&str, &str)])] = &[
    (
        "etcdserverpb.KV",
        &[
            ("Range", UNARY),
            ("RangeStream", SERVER_STREAM),
            ("Put", UNARY),
            ("DeleteRange", UNARY),
            ("Txn", UNARY),
            ("Compact", UNARY),
        ],
    ),
    ("etcdserverpb.Watch", &[("Watch", BIDI_STREAM)]),
    (
        "etcdserverpb.Lease",
        &[
            ("LeaseGrant", UNARY),
            ("LeaseRevoke", UNARY),
            ("LeaseKeepAlive", BIDI_STREAM),
            ("LeaseTimeToLive", UNARY),
            ("LeaseLeases", UNARY),
        ],
    ),
    (
        "etcdserverpb.Cluster",
        &[
            ("MemberAdd", UNARY),
            ("MemberRemove", UNARY),
            ("MemberUpdate", UNARY),
            ("MemberList", UNARY),
            ("MemberPromote", UNARY),
        ],
    ),
    (
        "etcdserverpb.Maintenance",
        &[
            ("Alarm", UNARY),
            ("Status", UNARY),
            ("Defragment", UNARY),
            ("Hash", UNARY),
            ("HashKV", UNARY),
            ("Snapshot", SERVER_STREAM),
            ("MoveLeader", UNARY),
            ("Downgrade", UNARY),
        ],
    ),
    (
        "etcdserverpb.Auth",
        &[
            ("AuthEnable", UNARY),
            ("AuthDisable", UNARY),
            ("AuthStatus", UNARY),
            ("Authenticate", UNARY),
            ("UserAdd", UNARY),
            ("UserGet", UNARY),
            ("UserList", UNARY),
            ("UserDelete", UNARY),
            ("UserChangePassword", UNARY),
            ("UserGrantRole", UNARY),
            ("UserRevokeRole", UNARY),
            ("RoleAdd", UNARY),
            ("RoleGet", UNARY),
            ("RoleList", UNARY),
            ("RoleDelete", UNARY),
            ("RoleGrantPermission", UNARY),
            ("RoleRevokePermission", UNARY),
        ],
    ),
    ("v3lockpb.Lock", &[("Lock", UNARY), ("Unlock", UNARY)]),
    (
        "v3electionpb.Election",
        &[
            ("Campaign", UNARY),
            ("Proclaim", UNARY),
            ("Leader", UNARY),
            ("Observe", SERVER_STREAM),
            ("Resign", UNARY),
        ],
    ),
    ("grpc.health.v1.Health", &[("Check", UNARY), ("Watch", SERVER_STREAM)]),
];

/// gRPC's status codes by number, as the Go middleware spells them.
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// The Go middleware's default buckets, 5 ms to 10 s.
static HANDLING_MICROS: [u64; 11] = [
    5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000,
    10_000_000,
];

/// The code of a call whose client went away.
pub const CANCELED: u16 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    grpc_type: &'static str,
    grpc_service: &'static str,
    grpc_method: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabels {
    grpc_type: &'static str,
    grpc_service: &'static str,
    grpc_method: &'static str,
    grpc_code: &'static str,
}

#[derive(Clone, Debug)]
struct Families {
    started: Family<MethodLabels, Counter>,
    handled: Family<CodeLabels, Counter>,
    received: Family<MethodLabels, Counter>,
    sent: Family<MethodLabels, Counter>,
    seconds: Family<MethodLabels, Durations, fn() -> Durations>,
}

/// Call counters of all methods.
#[derive(Clone, Debug)]
pub struct Grpc {
    families: Families,
    methods: Arc<HashMap<String, (MethodLabels, OnceLock<Method>)>>,
}

/// Call counters of one method.
#[derive(Clone, Debug)]
pub struct Method(Arc<MethodHandles>);

#[derive(Debug)]
struct MethodHandles {
    labels: MethodLabels,
    started: Counter,
    received: Counter,
    sent: Counter,
    seconds: Durations,
    succeeded: Counter,
    handled: Family<CodeLabels, Counter>,
}

impl Grpc {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let seconds: fn() -> Durations = || Durations::new(&HANDLING_MICROS);
        let families = Families {
            started: Family::default(),
            handled: Family::default(),
            received: Family::default(),
            sent: Family::default(),
            seconds: Family::new_with_constructor(seconds),
        };
        registry.register(
            "grpc_server_started",
            "Total number of RPCs started on the server",
            families.started.clone(),
        );
        registry.register(
            "grpc_server_handled",
            "Total number of RPCs completed on the server, regardless of success or failure",
            families.handled.clone(),
        );
        registry.register(
            "grpc_server_msg_received",
            "Total number of RPC stream messages received on the server",
            families.received.clone(),
        );
        registry.register(
            "grpc_server_msg_sent",
            "Total number of gRPC stream messages sent by the server",
            families.sent.clone(),
        );
        registry.register(
            "grpc_server_handling_seconds",
            "Histogram of response latency (seconds) of gRPC that had been application-level handled by the server",
            families.seconds.clone(),
        );
        let methods = METHODS
            .iter()
            .flat_map(|(service, methods)| methods.iter().map(move |method| (*service, *method)))
            .map(|(grpc_service, (grpc_method, grpc_type))| {
                let labels = MethodLabels { grpc_type, grpc_service, grpc_method };
                (format!("/{grpc_service}/{grpc_method}"), (labels, OnceLock::new()))
            })
            .collect();
        Self { families, methods: Arc::new(methods) }
    }

    /// The counters of the method at this path, such as `/etcdserverpb.KV/Range`, if it is one of ours.
    pub fn method(&self, path: &str) -> Option<&Method> {
        let (labels, handles) = self.methods.get(path)?;
        Some(handles.get_or_init(|| Method::new(labels.clone(), &self.families)))
    }
}

impl Method {
    fn new(labels: MethodLabels, families: &Families) -> Self {
        Self(Arc::new(MethodHandles {
            started: families.started.get_or_create_owned(&labels),
            received: families.received.get_or_create_owned(&labels),
            sent: families.sent.get_or_create_owned(&labels),
            seconds: families.seconds.get_or_create_owned(&labels),
            succeeded: families.handled.get_or_create_owned(&labels.with_code(0)),
            handled: families.handled.clone(),
            labels,
        }))
    }

    /// Counts messages from the client.
    pub fn received(&self, messages: u64) {
        self.0.received.inc_by(messages);
    }

    /// Counts a call as started.
    pub fn call(&self) -> Call {
        self.0.started.inc();
        Call { method: self.clone(), started: Instant::now(), finished: false }
    }
}

impl MethodLabels {
    fn with_code(&self, code: u16) -> CodeLabels {
        // The protocol says that a code nobody knows counts as Unknown.
        let grpc_code = CODES.get(usize::from(code)).copied().unwrap_or("Unknown");
        CodeLabels {
            grpc_type: self.grpc_type,
            grpc_service: self.grpc_service,
            grpc_method: self.grpc_method,
            grpc_code,
        }
    }
}

/// A call in progress. Dropped before [`Call::finish`], it counts as canceled by the client.
#[derive(Debug)]
pub struct Call {
    method: Method,
    started: Instant,
    finished: bool,
}

impl Call {
    /// Counts messages to the client.
    pub fn sent(&self, messages: u64) {
        self.method.0.sent.inc_by(messages);
    }

    /// Counts the call as answered with this gRPC status. Only the first status counts.
    pub fn finish(&mut self, code: u16) {
        if self.finished {
            return;
        }
        self.finished = true;
        let handles = &self.method.0;
        handles.seconds.observe(self.started.elapsed());
        if code == 0 {
            handles.succeeded.inc();
        } else {
            handles.handled.get_or_create(&handles.labels.with_code(code)).inc();
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.finish(CANCELED);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn grpc() -> (Registry, Grpc) {
        let mut registry = Registry::default();
        let grpc = Grpc::register(&mut registry);
        (registry, grpc)
    }

    fn page(registry: &Registry) -> String {
        let mut page = String::new();
        prometheus_client::encoding::text::encode(&mut page, registry).unwrap();
        page
    }

    #[test]
    fn unknown_paths_create_no_series() {
        let (registry, grpc) = grpc();
        let before = page(&registry);
        assert!(grpc.method("/etcdserverpb.KV/Rnage").is_none());
        assert!(grpc.method("").is_none());
        assert_eq!(page(&registry), before);
    }

    #[test]
    fn dropped_call_counts_as_canceled_and_a_second_status_is_ignored() {
        let (registry, grpc) = grpc();
        let method = grpc.method("/etcdserverpb.Watch/Watch").unwrap();
        drop(method.call());
        let mut call = method.call();
        call.finish(11);
        call.finish(0);
        drop(call);
        let page = page(&registry);
        assert!(page.contains("grpc_method=\"Watch\",grpc_code=\"Canceled\"} 1"), "{page}");
        assert!(page.contains("grpc_method=\"Watch\",grpc_code=\"OutOfRange\"} 1"), "{page}");
        assert!(page.contains("grpc_method=\"Watch\",grpc_code=\"OK\"} 0"), "{page}");
        assert!(page.contains("grpc_server_started_total{grpc_type=\"bidi_stream\""), "{page}");
    }

    /// The table is written by hand; the compiled protocol says whether it is complete.
    #[test]
    fn table_names_exactly_the_methods_of_the_protocol() {
        use prost::Message as _;
        let set = prost_types::FileDescriptorSet::decode(crate::proto::DESCRIPTORS).unwrap();
        let mut compiled = BTreeSet::new();
        // What nodes and our own commands say is not a client's call.
        for file in set.file.iter().filter(|file| file.package() != "node") {
            for service in &file.service {
                for method in &service.method {
                    let kind = match (method.client_streaming(), method.server_streaming()) {
                        (false, false) => UNARY,
                        (false, true) => SERVER_STREAM,
                        (true, true) => BIDI_STREAM,
                        (true, false) => "client_stream",
                    };
                    let service = format!("{}.{}", file.package(), service.name());
                    compiled.insert((service, method.name().to_owned(), kind));
                }
            }
        }
        let table: BTreeSet<_> = METHODS
            .iter()
            .filter(|(service, _)| !service.starts_with("grpc."))
            .flat_map(|(service, methods)| {
                methods.iter().map(|(m, kind)| ((*service).to_owned(), (*m).to_owned(), *kind))
            })
            .collect();
        assert_eq!(table, compiled);
    }
}
