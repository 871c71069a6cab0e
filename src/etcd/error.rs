//! The one place where our errors become etcd's gRPC statuses, byte for byte.
//!
//! The Go client maps an error by its text first and by its code second, and retries by what it finds: a wrong word
//! makes Kubernetes treat a definite refusal as a lost connection, or the other way round.
//!
//! # Invariants
//!
//! - UNAVAILABLE is used only where the outcome may be unknown or another member may do better: the client repeats
//!   reads on it.
//! - Every text is in the golden table of the tests.

use tonic::{Code, Status};

use crate::apply::Refusal;
use crate::mvcc::{RevisionError, StoreError};
use crate::raft::{ProposeError, ReadError};

/// An answer that etcd gives instead of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the text beside each says what it means")]
pub enum EtcdError {
    EmptyKey,
    KeyNotFound,
    ValueProvided,
    LeaseProvided,
    TooManyOps,
    DuplicateKey,
    InvalidSortOption,
    Compacted,
    FutureRevision,
    NoSpace,
    LeaseNotFound,
    LeaseExists,
    LeaseTtlTooLarge,
    MemberExists,
    PeerUrlExists,
    MemberNotEnoughStarted,
    MemberBadUrls,
    MemberNotFound,
    MemberNotLearner,
    LearnerNotReady,
    TooManyLearners,
    RequestTooLarge,
    TooManyRequests,
    RootUserNotExist,
    UserEmpty,
    UserNotFound,
    RoleEmpty,
    RoleNotFound,
    PermissionNotGiven,
    InvalidAuthManagement,
    AuthNotEnabled,
    NoLeader,
    NotLeader,
    LeaderChanged,
    Stopped,
    TimedOut,
    Unhealthy,
    Corrupt,
    NotSupportedForLearner,
    BadLeaderTransferee,
    WrongDowngradeVersionFormat,
    InvalidDowngradeTarget,
    NoInflightDowngrade,
    UnknownMethod,
    WatchCanceled,
    MissingLeaderKey,
    ElectionNotLeader,
    ElectionNoLeader,
    SessionExpired,
}

impl EtcdError {
    /// etcd's status code and text.
    ///
    /// Two codes differ from etcd's own error table on purpose: `MemberNotEnoughStarted` and `TooManyRequests` leave
    /// its server as client-side errors, which gRPC turns into UNKNOWN on the wire.
    #[allow(clippy::too_many_lines, reason = "a table, one line an error")]
    pub const fn code_and_text(self) -> (Code, &'static str) {
        use Code::{
            Cancelled, DataLoss, FailedPrecondition, InvalidArgument, NotFound, OutOfRange,
            ResourceExhausted, Unavailable, Unknown,
        };
        match self {
            Self::EmptyKey => (InvalidArgument, "etcdserver: key is not provided"),
            Self::KeyNotFound => (InvalidArgument, "etcdserver: key not found"),
            Self::ValueProvided => (InvalidArgument, "etcdserver: value is provided"),
            Self::LeaseProvided => (InvalidArgument, "etcdserver: lease is provided"),
            Self::TooManyOps => (InvalidArgument, "etcdserver: too many operations in txn request"),
            Self::DuplicateKey => {
                (InvalidArgument, "etcdserver: duplicate key given in txn request")
            }
            Self::InvalidSortOption => (InvalidArgument, "etcdserver: invalid sort option"),
            Self::Compacted => {
                (OutOfRange, "etcdserver: mvcc: required revision has been compacted")
            }
            Self::FutureRevision => {
                (OutOfRange, "etcdserver: mvcc: required revision is a future revision")
            }
            Self::NoSpace => (ResourceExhausted, "etcdserver: mvcc: database space exceeded"),
            Self::LeaseNotFound => (NotFound, "etcdserver: requested lease not found"),
            Self::LeaseExists => (FailedPrecondition, "etcdserver: lease already exists"),
            Self::LeaseTtlTooLarge => (OutOfRange, "etcdserver: too large lease TTL"),
            Self::MemberExists => (FailedPrecondition, "etcdserver: member ID already exist"),
            Self::PeerUrlExists => (FailedPrecondition, "etcdserver: Peer URLs already exists"),
            Self::MemberNotEnoughStarted => {
                (Unknown, "etcdserver: re-configuration failed due to not enough started members")
            }
            Self::MemberBadUrls => (InvalidArgument, "etcdserver: given member URLs are invalid"),
            Self::MemberNotFound => (NotFound, "etcdserver: member not found"),
            Self::MemberNotLearner => {
                (FailedPrecondition, "etcdserver: can only promote a learner member")
            }
            Self::LearnerNotReady => (
                FailedPrecondition,
                "etcdserver: can only promote a learner member which is in sync with leader",
            ),
            Self::TooManyLearners => {
                (FailedPrecondition, "etcdserver: too many learner members in cluster")
            }
            Self::RequestTooLarge => (InvalidArgument, "etcdserver: request is too large"),
            Self::TooManyRequests => (Unknown, "etcdserver: too many requests"),
            Self::RootUserNotExist => (FailedPrecondition, "etcdserver: root user does not exist"),
            Self::UserEmpty => (InvalidArgument, "etcdserver: user name is empty"),
            Self::UserNotFound => (FailedPrecondition, "etcdserver: user name not found"),
            Self::RoleEmpty => (InvalidArgument, "etcdserver: role name is empty"),
            Self::RoleNotFound => (FailedPrecondition, "etcdserver: role name not found"),
            Self::PermissionNotGiven => (InvalidArgument, "etcdserver: permission not given"),
            Self::InvalidAuthManagement => (InvalidArgument, "etcdserver: invalid auth management"),
            Self::AuthNotEnabled => {
                (FailedPrecondition, "etcdserver: authentication is not enabled")
            }
            Self::NoLeader => (Unavailable, "etcdserver: no leader"),
            Self::NotLeader => (FailedPrecondition, "etcdserver: not leader"),
            Self::LeaderChanged => (Unavailable, "etcdserver: leader changed"),
            Self::Stopped => (Unavailable, "etcdserver: server stopped"),
            Self::TimedOut => (Unavailable, "etcdserver: request timed out"),
            Self::Unhealthy => (Unavailable, "etcdserver: unhealthy cluster"),
            Self::Corrupt => (DataLoss, "etcdserver: corrupt cluster"),
            Self::NotSupportedForLearner => {
                (FailedPrecondition, "etcdserver: rpc not supported for learner")
            }
            Self::BadLeaderTransferee => (FailedPrecondition, "etcdserver: bad leader transferee"),
            Self::WrongDowngradeVersionFormat => {
                (InvalidArgument, "etcdserver: wrong downgrade target version format")
            }
            Self::InvalidDowngradeTarget => {
                (InvalidArgument, "etcdserver: invalid downgrade target version")
            }
            Self::NoInflightDowngrade => {
                (FailedPrecondition, "etcdserver: no inflight downgrade job")
            }
            Self::UnknownMethod => (Unknown, "etcdserver: unknown method"),
            Self::WatchCanceled => (Cancelled, "etcdserver: watch canceled"),
            Self::MissingLeaderKey => (Unknown, "\"leader\" field must be provided"),
            Self::ElectionNotLeader => (Unknown, "election: not leader"),
            Self::ElectionNoLeader => (Unknown, "election: no leader"),
            Self::SessionExpired => (Unknown, "mutex: session is expired"),
        }
    }

    /// etcd's text.
    pub const fn text(self) -> &'static str {
        self.code_and_text().1
    }
}

impl From<EtcdError> for Status {
    fn from(error: EtcdError) -> Self {
        let (code, text) = error.code_and_text();
        Self::new(code, text)
    }
}

impl From<Refusal> for EtcdError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::KeyNotFound => Self::KeyNotFound,
            Refusal::LeaseNotFound => Self::LeaseNotFound,
            Refusal::LeaseExists => Self::LeaseExists,
            Refusal::Compacted => Self::Compacted,
            Refusal::FutureRevision => Self::FutureRevision,
            Refusal::NoSpace => Self::NoSpace,
            Refusal::LeaseTtlTooLarge => Self::LeaseTtlTooLarge,
            Refusal::Corrupt => Self::Corrupt,
            // A bug of ours; `kv` asks before it reads.
            Refusal::WriteInReadOnly => Self::UnknownMethod,
        }
    }
}

impl From<ProposeError> for EtcdError {
    fn from(error: ProposeError) -> Self {
        match error {
            ProposeError::TimedOut => Self::TimedOut,
            ProposeError::NoLeader => Self::NoLeader,
            ProposeError::LeaderChanged => Self::LeaderChanged,
            ProposeError::TooManyRequests => Self::TooManyRequests,
            ProposeError::Stopped => Self::Stopped,
        }
    }
}

impl From<ReadError> for EtcdError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::TimedOut => Self::TimedOut,
            ReadError::NoLeader => Self::NoLeader,
            ReadError::Stopped => Self::Stopped,
        }
    }
}

impl From<RevisionError> for EtcdError {
    fn from(error: RevisionError) -> Self {
        match error {
            RevisionError::Compacted(_) => Self::Compacted,
            RevisionError::Future => Self::FutureRevision,
        }
    }
}

/// The state machine failed underneath a read. Not the client's fault, and another member may do better, but
/// nothing that waiting helps: INTERNAL, with the reason.
pub(super) fn store_failed(error: &StoreError) -> Status {
    Status::internal(format!("etcdserver: the store failed: {error}"))
}

/// What etcd's Lock and Election services make of an error: they are clients of their own server, and gRPC turns
/// what a client returns into UNKNOWN with the same text.
pub(super) fn through_own_client(status: &Status) -> Status {
    Status::unknown(status.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// etcd's numbers and words, written down from its own table and servers.
    const GOLDEN: &[(EtcdError, i32, &str)] = &[
        (EtcdError::EmptyKey, 3, "etcdserver: key is not provided"),
        (EtcdError::KeyNotFound, 3, "etcdserver: key not found"),
        (EtcdError::ValueProvided, 3, "etcdserver: value is provided"),
        (EtcdError::LeaseProvided, 3, "etcdserver: lease is provided"),
        (EtcdError::TooManyOps, 3, "etcdserver: too many operations in txn request"),
        (EtcdError::DuplicateKey, 3, "etcdserver: duplicate key given in txn request"),
        (EtcdError::InvalidSortOption, 3, "etcdserver: invalid sort option"),
        (EtcdError::Compacted, 11, "etcdserver: mvcc: required revision has been compacted"),
        (EtcdError::FutureRevision, 11, "etcdserver: mvcc: required revision is a future revision"),
        (EtcdError::NoSpace, 8, "etcdserver: mvcc: database space exceeded"),
        (EtcdError::LeaseNotFound, 5, "etcdserver: requested lease not found"),
        (EtcdError::LeaseExists, 9, "etcdserver: lease already exists"),
        (EtcdError::LeaseTtlTooLarge, 11, "etcdserver: too large lease TTL"),
        (EtcdError::MemberExists, 9, "etcdserver: member ID already exist"),
        (EtcdError::PeerUrlExists, 9, "etcdserver: Peer URLs already exists"),
        (
            EtcdError::MemberNotEnoughStarted,
            2,
            "etcdserver: re-configuration failed due to not enough started members",
        ),
        (EtcdError::MemberBadUrls, 3, "etcdserver: given member URLs are invalid"),
        (EtcdError::MemberNotFound, 5, "etcdserver: member not found"),
        (EtcdError::MemberNotLearner, 9, "etcdserver: can only promote a learner member"),
        (
            EtcdError::LearnerNotReady,
            9,
            "etcdserver: can only promote a learner member which is in sync with leader",
        ),
        (EtcdError::TooManyLearners, 9, "etcdserver: too many learner members in cluster"),
        (EtcdError::RequestTooLarge, 3, "etcdserver: request is too large"),
        (EtcdError::TooManyRequests, 2, "etcdserver: too many requests"),
        (EtcdError::RootUserNotExist, 9, "etcdserver: root user does not exist"),
        (EtcdError::UserEmpty, 3, "etcdserver: user name is empty"),
        (EtcdError::UserNotFound, 9, "etcdserver: user name not found"),
        (EtcdError::RoleEmpty, 3, "etcdserver: role name is empty"),
        (EtcdError::RoleNotFound, 9, "etcdserver: role name not found"),
        (EtcdError::PermissionNotGiven, 3, "etcdserver: permission not given"),
        (EtcdError::InvalidAuthManagement, 3, "etcdserver: invalid auth management"),
        (EtcdError::AuthNotEnabled, 9, "etcdserver: authentication is not enabled"),
        (EtcdError::NoLeader, 14, "etcdserver: no leader"),
        (EtcdError::NotLeader, 9, "etcdserver: not leader"),
        (EtcdError::LeaderChanged, 14, "etcdserver: leader changed"),
        (EtcdError::Stopped, 14, "etcdserver: server stopped"),
        (EtcdError::TimedOut, 14, "etcdserver: request timed out"),
        (EtcdError::Unhealthy, 14, "etcdserver: unhealthy cluster"),
        (EtcdError::Corrupt, 15, "etcdserver: corrupt cluster"),
        (EtcdError::NotSupportedForLearner, 9, "etcdserver: rpc not supported for learner"),
        (EtcdError::BadLeaderTransferee, 9, "etcdserver: bad leader transferee"),
        (
            EtcdError::WrongDowngradeVersionFormat,
            3,
            "etcdserver: wrong downgrade target version format",
        ),
        (EtcdError::InvalidDowngradeTarget, 3, "etcdserver: invalid downgrade target version"),
        (EtcdError::NoInflightDowngrade, 9, "etcdserver: no inflight downgrade job"),
        (EtcdError::UnknownMethod, 2, "etcdserver: unknown method"),
        (EtcdError::WatchCanceled, 1, "etcdserver: watch canceled"),
        (EtcdError::MissingLeaderKey, 2, "\"leader\" field must be provided"),
        (EtcdError::ElectionNotLeader, 2, "election: not leader"),
        (EtcdError::ElectionNoLeader, 2, "election: no leader"),
        (EtcdError::SessionExpired, 2, "mutex: session is expired"),
    ];

    #[test]
    fn codes_and_texts_are_etcds() {
        for (error, code, text) in GOLDEN {
            let status = Status::from(*error);
            assert_eq!((i32::from(status.code()), status.message()), (*code, *text), "{error:?}");
        }
    }

    #[test]
    fn definite_refusals_are_never_unavailable() {
        let refusals = [
            Refusal::KeyNotFound,
            Refusal::LeaseNotFound,
            Refusal::LeaseExists,
            Refusal::Compacted,
            Refusal::FutureRevision,
            Refusal::NoSpace,
            Refusal::LeaseTtlTooLarge,
            Refusal::Corrupt,
        ];
        for refusal in refusals {
            let status = Status::from(EtcdError::from(refusal.clone()));
            assert_ne!(status.code(), Code::Unavailable, "{refusal:?}");
        }
    }

    #[test]
    fn unknown_outcomes_are_unavailable() {
        for error in [ProposeError::TimedOut, ProposeError::LeaderChanged, ProposeError::Stopped] {
            let status = Status::from(EtcdError::from(error.clone()));
            assert_eq!(status.code(), Code::Unavailable, "{error:?}");
        }
    }
}
