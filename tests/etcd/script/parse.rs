//! From a line to a request message.

use bytes::Bytes;
use k3s_server::proto::authpb;
use k3s_server::proto::etcdserverpb as pb;
use k3s_server::proto::v3electionpb as election;
use k3s_server::proto::v3lockpb as lock;

/// One line, ready to be sent.
#[derive(Clone, Debug)]
pub enum Call {
    Put(pb::PutRequest),
    Range(pb::RangeRequest),
    RangeStream(pb::RangeRequest),
    DeleteRange(pb::DeleteRangeRequest),
    Txn(pb::TxnRequest),
    Compact(pb::CompactionRequest),
    LeaseGrant(pb::LeaseGrantRequest),
    LeaseRevoke(pb::LeaseRevokeRequest),
    LeaseKeepAlive(pb::LeaseKeepAliveRequest),
    LeaseTimeToLive(pb::LeaseTimeToLiveRequest),
    LeaseLeases,
    Watch {
        stream: String,
        request: pb::watch_request::RequestUnion,
    },
    WatchReceive {
        stream: String,
        count: usize,
    },
    WatchQuiet {
        stream: String,
    },
    WatchDrain {
        stream: String,
    },
    Status,
    /// The fields that etcd 3.6 added to the status.
    StatusNewFields,
    Alarm(pb::AlarmRequest),
    Defragment,
    Hash,
    HashKv(pb::HashKvRequest),
    Snapshot,
    MoveLeader(pb::MoveLeaderRequest),
    Downgrade(pb::DowngradeRequest),
    MemberList(pb::MemberListRequest),
    MemberAdd(pb::MemberAddRequest),
    MemberRemove(pb::MemberRemoveRequest),
    MemberUpdate(pb::MemberUpdateRequest),
    MemberPromote(pb::MemberPromoteRequest),
    Auth(AuthCall),
    Lock(lock::LockRequest),
    Unlock(lock::UnlockRequest),
    Campaign(election::CampaignRequest),
    Proclaim(election::ProclaimRequest),
    Leader(election::LeaderRequest),
    Observe(election::LeaderRequest),
    Resign(election::ResignRequest),
    /// A call of any service with the metadata `hasleader: true`.
    HasLeader(Box<Call>),
}

/// The Auth service. None of it works here, so only the requests matter.
#[derive(Clone, Debug)]
pub enum AuthCall {
    Enable,
    Disable,
    Status,
    Authenticate(pb::AuthenticateRequest),
    UserAdd(pb::AuthUserAddRequest),
    UserGet(pb::AuthUserGetRequest),
    UserList,
    UserDelete(pb::AuthUserDeleteRequest),
    UserChangePassword(pb::AuthUserChangePasswordRequest),
    UserGrantRole(pb::AuthUserGrantRoleRequest),
    UserRevokeRole(pb::AuthUserRevokeRoleRequest),
    RoleAdd(pb::AuthRoleAddRequest),
    RoleGet(pb::AuthRoleGetRequest),
    RoleList,
    RoleDelete(pb::AuthRoleDeleteRequest),
    RoleGrantPermission(pb::AuthRoleGrantPermissionRequest),
    RoleRevokePermission(pb::AuthRoleRevokePermissionRequest),
}

/// Parses one line. The error says what was not understood.
pub fn parse(line: &str) -> Result<Call, String> {
    let tokens = tokens(line)?;
    let mut words = Words { tokens: &tokens };
    let call = call(&mut words)?;
    words.end()?;
    Ok(call)
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(Vec<u8>),
    Open,
    Close,
    Semicolon,
}

fn tokens(line: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut bytes = line.bytes().peekable();
    while let Some(&byte) = bytes.peek() {
        let single = match byte {
            b' ' => None,
            b'(' => Some(Token::Open),
            b')' => Some(Token::Close),
            b';' => Some(Token::Semicolon),
            _ => {
                tokens.push(Token::Word(word(&mut bytes)?));
                continue;
            }
        };
        bytes.next();
        tokens.extend(single);
    }
    Ok(tokens)
}

fn word(bytes: &mut std::iter::Peekable<std::str::Bytes<'_>>) -> Result<Vec<u8>, String> {
    let (mut word, mut quoted, mut was_quoted) = (Vec::new(), false, false);
    while let Some(&byte) = bytes.peek() {
        match byte {
            b' ' | b'(' | b')' | b';' if !quoted => break,
            b'"' => {
                quoted = !quoted;
                was_quoted = true;
            }
            b'\\' if quoted => {
                bytes.next();
                word.push(escape(bytes)?);
                continue;
            }
            _ => word.push(byte),
        }
        bytes.next();
    }
    if quoted {
        return Err("a quote that does not end".into());
    }
    Ok(if was_quoted { word } else { repeat(word) })
}

fn escape(bytes: &mut std::iter::Peekable<std::str::Bytes<'_>>) -> Result<u8, String> {
    match bytes.next() {
        Some(b'0') => Ok(0),
        Some(b'n') => Ok(b'\n'),
        Some(b'x') => {
            let digits: String = bytes.by_ref().take(2).map(char::from).collect();
            u8::from_str_radix(&digits, 16).map_err(|_| format!("\\x{digits} is no byte"))
        }
        Some(byte @ (b'"' | b'\\')) => Ok(byte),
        other => Err(format!("unknown escape {other:?}")),
    }
}

/// `x*1000` is a thousand x.
fn repeat(word: Vec<u8>) -> Vec<u8> {
    let count = match word.as_slice() {
        [_, b'*', digits @ ..] => std::str::from_utf8(digits).ok().and_then(|d| d.parse().ok()),
        _ => None,
    };
    count.map_or_else(|| word.clone(), |count| vec![word[0]; count])
}

struct Words<'a> {
    tokens: &'a [Token],
}

impl Words<'_> {
    fn bytes(&mut self) -> Result<Bytes, String> {
        match self.tokens {
            [Token::Word(word), rest @ ..] => {
                self.tokens = rest;
                Ok(word.clone().into())
            }
            other => Err(format!("found {:?}, expected a word", other.first())),
        }
    }

    fn text(&mut self) -> Result<String, String> {
        Ok(String::from_utf8_lossy(&self.bytes()?).into_owned())
    }

    fn number<T: std::str::FromStr>(&mut self) -> Result<T, String> {
        number(&self.text()?)
    }

    /// The options that follow: `name` or `name=value`.
    fn options(&mut self) -> Vec<(String, Bytes)> {
        let mut options = Vec::new();
        while let [Token::Word(word), ..] = self.tokens {
            let split = word.iter().position(|byte| *byte == b'=').filter(|at| 0 < *at);
            let name = &word[..split.unwrap_or(word.len())];
            let Ok(name) = std::str::from_utf8(name) else { break };
            let is_name = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            if !is_name {
                break;
            }
            let value = split.map_or(&[][..], |at| &word[at + 1..]);
            options.push((name.to_owned(), Bytes::copy_from_slice(value)));
            self.tokens = &self.tokens[1..];
        }
        options
    }

    fn take(&mut self, token: &Token) -> bool {
        let found = self.tokens.first() == Some(token);
        if found {
            self.tokens = &self.tokens[1..];
        }
        found
    }

    fn take_word(&mut self, word: &str) -> bool {
        self.take(&Token::Word(word.as_bytes().to_vec()))
    }

    fn end(&self) -> Result<(), String> {
        self.tokens.first().map_or(Ok(()), |token| Err(format!("did not expect {token:?}")))
    }

    /// `(item; item; ...)`
    fn list<T>(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<T, String>,
    ) -> Result<Vec<T>, String> {
        if !self.take(&Token::Open) {
            return Err("expected (".into());
        }
        let mut items = Vec::new();
        while !self.take(&Token::Close) {
            items.push(item(self)?);
            if !self.take(&Token::Semicolon) && self.tokens.first() != Some(&Token::Close) {
                return Err(format!("found {:?}, expected ; or )", self.tokens.first()));
            }
        }
        Ok(items)
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text} is not a number"))
}

fn value<T: std::str::FromStr>(bytes: &[u8]) -> Result<T, String> {
    number(&String::from_utf8_lossy(bytes))
}

fn call(words: &mut Words<'_>) -> Result<Call, String> {
    let name = words.text()?;
    match name.as_str() {
        "put" => put(words).map(Call::Put),
        "get" => get(words).map(Call::Range),
        "stream" => get(words).map(Call::RangeStream),
        "del" => del(words).map(Call::DeleteRange),
        "txn" => txn(words).map(Call::Txn),
        "compact" => {
            let revision = words.number()?;
            Ok(Call::Compact(pb::CompactionRequest {
                revision,
                physical: words.take_word("physical"),
            }))
        }
        "watch" => watch(words),
        "with-leader" => call(words).map(|call| Call::HasLeader(Box::new(call))),
        "lock" => {
            let (name, lease) = (words.bytes()?, words.number()?);
            Ok(Call::Lock(lock::LockRequest { name, lease }))
        }
        "unlock" => Ok(Call::Unlock(lock::UnlockRequest { key: words.bytes()? })),
        name if name.starts_with("auth-") => auth(name, words).map(Call::Auth),
        name => match lease(name, words)? {
            Some(call) => Ok(call),
            None => maintenance(name, words)?.map_or_else(|| election_call(name, words), Ok),
        },
    }
}

/// The end of a prefix: the first key that does not begin with it.
fn prefix_end(key: &[u8]) -> Bytes {
    let mut end = key.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end.into();
        }
    }
    Bytes::from_static(b"\0")
}

/// `prefix`, `from` or `end=`: what goes into range_end.
fn range_end(key: &Bytes, name: &str, bytes: &Bytes) -> Option<Bytes> {
    match name {
        "prefix" => Some(prefix_end(key)),
        "from" => Some(Bytes::from_static(b"\0")),
        "end" => Some(bytes.clone()),
        _ => None,
    }
}

fn put(words: &mut Words<'_>) -> Result<pb::PutRequest, String> {
    let (key, stored) = (words.bytes()?, words.bytes()?);
    let mut put = pb::PutRequest { key, value: stored, ..Default::default() };
    for (name, bytes) in words.options() {
        match name.as_str() {
            "lease" => put.lease = value(&bytes)?,
            "prev_kv" => put.prev_kv = true,
            "ignore_value" => put.ignore_value = true,
            "ignore_lease" => put.ignore_lease = true,
            _ => return Err(format!("put has no option {name}")),
        }
    }
    Ok(put)
}

fn get(words: &mut Words<'_>) -> Result<pb::RangeRequest, String> {
    let mut range = pb::RangeRequest { key: words.bytes()?, ..Default::default() };
    for (name, bytes) in words.options() {
        if let Some(end) = range_end(&range.key, &name, &bytes) {
            range.range_end = end;
            continue;
        }
        match name.as_str() {
            "limit" => range.limit = value(&bytes)?,
            "rev" => range.revision = value(&bytes)?,
            "sort" => (range.sort_target, range.sort_order) = sort(&bytes)?,
            "serializable" => range.serializable = true,
            "keys_only" => range.keys_only = true,
            "count_only" => range.count_only = true,
            "min_mod" => range.min_mod_revision = value(&bytes)?,
            "max_mod" => range.max_mod_revision = value(&bytes)?,
            "min_create" => range.min_create_revision = value(&bytes)?,
            "max_create" => range.max_create_revision = value(&bytes)?,
            _ => return Err(format!("get has no option {name}")),
        }
    }
    Ok(range)
}

/// `VERSION:DESCEND`, or numbers for values that etcd does not know.
fn sort(bytes: &[u8]) -> Result<(i32, i32), String> {
    let text = String::from_utf8_lossy(bytes);
    let (target, order) = text.split_once(':').ok_or("sort=TARGET:ORDER")?;
    let target = pb::range_request::SortTarget::from_str_name(target)
        .map_or_else(|| number(target), |known| Ok(known as i32))?;
    let order = pb::range_request::SortOrder::from_str_name(order)
        .map_or_else(|| number(order), |known| Ok(known as i32))?;
    Ok((target, order))
}

fn del(words: &mut Words<'_>) -> Result<pb::DeleteRangeRequest, String> {
    let mut del = pb::DeleteRangeRequest { key: words.bytes()?, ..Default::default() };
    for (name, bytes) in words.options() {
        match range_end(&del.key, &name, &bytes) {
            Some(end) => del.range_end = end,
            None if name == "prev_kv" => del.prev_kv = true,
            None => return Err(format!("del has no option {name}")),
        }
    }
    Ok(del)
}

fn txn(words: &mut Words<'_>) -> Result<pb::TxnRequest, String> {
    let mut txn = pb::TxnRequest::default();
    loop {
        if words.take_word("if") {
            txn.compare = words.list(compare)?;
        } else if words.take_word("then") {
            txn.success = words.list(operation)?;
        } else if words.take_word("else") {
            txn.failure = words.list(operation)?;
        } else {
            return Ok(txn);
        }
    }
}

fn operation(words: &mut Words<'_>) -> Result<pb::RequestOp, String> {
    use pb::request_op::Request;
    let request = match words.text()?.as_str() {
        "put" => Some(Request::RequestPut(put(words)?)),
        "get" => Some(Request::RequestRange(get(words)?)),
        "del" => Some(Request::RequestDeleteRange(del(words)?)),
        "txn" => Some(Request::RequestTxn(txn(words)?)),
        "nil" => None,
        other => return Err(format!("a txn has no {other}")),
    };
    Ok(pb::RequestOp { request })
}

fn compare(words: &mut Words<'_>) -> Result<pb::Compare, String> {
    use pb::compare::{CompareResult, CompareTarget, TargetUnion};
    let target = words.text()?;
    let mut compare = pb::Compare { key: words.bytes()?, ..Default::default() };
    for (name, bytes) in words.options() {
        compare.range_end = range_end(&compare.key, &name, &bytes)
            .ok_or_else(|| format!("a compare has no option {name}"))?;
    }
    let result = match words.text()?.as_str() {
        "=" => CompareResult::Equal,
        "!=" => CompareResult::NotEqual,
        "<" => CompareResult::Less,
        ">" => CompareResult::Greater,
        other => return Err(format!("found {other}, expected = != < or >")),
    };
    compare.result = result as i32;
    let (target, union) = match target.as_str() {
        "version" => (CompareTarget::Version, TargetUnion::Version(words.number()?)),
        "create" => (CompareTarget::Create, TargetUnion::CreateRevision(words.number()?)),
        "mod" => (CompareTarget::Mod, TargetUnion::ModRevision(words.number()?)),
        "value" => (CompareTarget::Value, TargetUnion::Value(words.bytes()?)),
        "lease" => (CompareTarget::Lease, TargetUnion::Lease(words.number()?)),
        other => return Err(format!("nothing to compare by the name of {other}")),
    };
    compare.target = target as i32;
    compare.target_union = Some(union);
    Ok(compare)
}

fn watch(words: &mut Words<'_>) -> Result<Call, String> {
    use pb::watch_request::RequestUnion;
    let stream = words.text()?;
    let request = match words.text()?.as_str() {
        "create" => RequestUnion::CreateRequest(watch_create(words)?),
        "cancel" => {
            RequestUnion::CancelRequest(pb::WatchCancelRequest { watch_id: words.number()? })
        }
        "progress" => RequestUnion::ProgressRequest(pb::WatchProgressRequest {}),
        "recv" => return Ok(Call::WatchReceive { stream, count: words.number()? }),
        "quiet" => return Ok(Call::WatchQuiet { stream }),
        "drain" => return Ok(Call::WatchDrain { stream }),
        other => return Err(format!("a watch has no {other}")),
    };
    Ok(Call::Watch { stream, request })
}

fn watch_create(words: &mut Words<'_>) -> Result<pb::WatchCreateRequest, String> {
    use pb::watch_create_request::FilterType;
    let mut create = pb::WatchCreateRequest { key: words.bytes()?, ..Default::default() };
    for (name, bytes) in words.options() {
        if let Some(end) = range_end(&create.key, &name, &bytes) {
            create.range_end = end;
            continue;
        }
        match name.as_str() {
            "rev" => create.start_revision = value(&bytes)?,
            "id" => create.watch_id = value(&bytes)?,
            "prev_kv" => create.prev_kv = true,
            "progress_notify" => create.progress_notify = true,
            "fragment" => create.fragment = true,
            "noput" => create.filters.push(FilterType::Noput as i32),
            "nodelete" => create.filters.push(FilterType::Nodelete as i32),
            _ => return Err(format!("a watch has no option {name}")),
        }
    }
    Ok(create)
}

fn lease(name: &str, words: &mut Words<'_>) -> Result<Option<Call>, String> {
    Ok(Some(match name {
        "grant" => {
            let mut grant = pb::LeaseGrantRequest { ttl: words.number()?, id: 0 };
            for (name, bytes) in words.options() {
                match name.as_str() {
                    "id" => grant.id = value(&bytes)?,
                    _ => return Err(format!("grant has no option {name}")),
                }
            }
            Call::LeaseGrant(grant)
        }
        "revoke" => Call::LeaseRevoke(pb::LeaseRevokeRequest { id: words.number()? }),
        "keepalive" => Call::LeaseKeepAlive(pb::LeaseKeepAliveRequest { id: words.number()? }),
        "ttl" => {
            let id = words.number()?;
            let keys = words.take_word("keys");
            Call::LeaseTimeToLive(pb::LeaseTimeToLiveRequest { id, keys })
        }
        "leases" => Call::LeaseLeases,
        _ => return Ok(None),
    }))
}

fn maintenance(name: &str, words: &mut Words<'_>) -> Result<Option<Call>, String> {
    Ok(Some(match name {
        "status" => Call::Status,
        "status-new-fields" => Call::StatusNewFields,
        "defragment" => Call::Defragment,
        "hash" => Call::Hash,
        "hashkv" => Call::HashKv(pb::HashKvRequest { revision: words.number()? }),
        "snapshot" => Call::Snapshot,
        "alarm" => {
            let (action, kind) = (words.number()?, words.number()?);
            let member_id = words.number()?;
            Call::Alarm(pb::AlarmRequest { action, alarm: kind, member_id })
        }
        "move-leader" => Call::MoveLeader(pb::MoveLeaderRequest { target_id: words.number()? }),
        "downgrade" => {
            let (action, version) = (words.number()?, words.text()?);
            Call::Downgrade(pb::DowngradeRequest { action, version })
        }
        "members" => Call::MemberList(pb::MemberListRequest {
            linearizable: words.take_word("linearizable"),
        }),
        "member-add" => {
            let peer_ur_ls = vec![words.text()?];
            let is_learner = words.take_word("learner");
            Call::MemberAdd(pb::MemberAddRequest { peer_ur_ls, is_learner })
        }
        "member-remove" => Call::MemberRemove(pb::MemberRemoveRequest { id: words.number()? }),
        "member-update" => {
            let (id, url) = (words.number()?, words.text()?);
            Call::MemberUpdate(pb::MemberUpdateRequest { id, peer_ur_ls: vec![url] })
        }
        "member-promote" => Call::MemberPromote(pb::MemberPromoteRequest { id: words.number()? }),
        _ => return Ok(None),
    }))
}

fn election_call(name: &str, words: &mut Words<'_>) -> Result<Call, String> {
    // NAME KEY REV LEASE, as `campaign` answered.
    let leader_key = |words: &mut Words<'_>| -> Result<_, String> {
        let (name, key) = (words.bytes()?, words.bytes()?);
        let (rev, lease) = (words.number()?, words.number()?);
        Ok(Some(election::LeaderKey { name, key, rev, lease }))
    };
    Ok(match name {
        "campaign" => {
            let (name, lease, value) = (words.bytes()?, words.number()?, words.bytes()?);
            Call::Campaign(election::CampaignRequest { name, lease, value })
        }
        "proclaim" => {
            let leader = leader_key(words)?;
            Call::Proclaim(election::ProclaimRequest { leader, value: words.bytes()? })
        }
        "leader" => Call::Leader(election::LeaderRequest { name: words.bytes()? }),
        "observe" => Call::Observe(election::LeaderRequest { name: words.bytes()? }),
        "resign" => Call::Resign(election::ResignRequest { leader: leader_key(words)? }),
        other => return Err(format!("no request by the name of {other}")),
    })
}

fn auth(name: &str, words: &mut Words<'_>) -> Result<AuthCall, String> {
    Ok(match name {
        "auth-enable" => AuthCall::Enable,
        "auth-disable" => AuthCall::Disable,
        "auth-status" => AuthCall::Status,
        "auth-authenticate" => {
            let (name, password) = (words.text()?, words.text()?);
            AuthCall::Authenticate(pb::AuthenticateRequest { name, password })
        }
        "auth-user-add" => {
            let (name, password) = (words.text()?, words.text()?);
            let options = Some(authpb::UserAddOptions { no_password: false });
            let hashed_password = String::new();
            AuthCall::UserAdd(pb::AuthUserAddRequest { name, password, options, hashed_password })
        }
        "auth-user-get" => AuthCall::UserGet(pb::AuthUserGetRequest { name: words.text()? }),
        "auth-user-list" => AuthCall::UserList,
        "auth-user-delete" => {
            AuthCall::UserDelete(pb::AuthUserDeleteRequest { name: words.text()? })
        }
        "auth-user-password" => {
            let (name, password) = (words.text()?, words.text()?);
            AuthCall::UserChangePassword(pb::AuthUserChangePasswordRequest {
                name,
                password,
                hashed_password: String::new(),
            })
        }
        "auth-user-grant" => {
            let (user, role) = (words.text()?, words.text()?);
            AuthCall::UserGrantRole(pb::AuthUserGrantRoleRequest { user, role })
        }
        "auth-user-revoke" => {
            let (name, role) = (words.text()?, words.text()?);
            AuthCall::UserRevokeRole(pb::AuthUserRevokeRoleRequest { name, role })
        }
        name => auth_role(name, words)?,
    })
}

fn auth_role(name: &str, words: &mut Words<'_>) -> Result<AuthCall, String> {
    Ok(match name {
        "auth-role-add" => AuthCall::RoleAdd(pb::AuthRoleAddRequest { name: words.text()? }),
        "auth-role-get" => AuthCall::RoleGet(pb::AuthRoleGetRequest { role: words.text()? }),
        "auth-role-list" => AuthCall::RoleList,
        "auth-role-delete" => {
            AuthCall::RoleDelete(pb::AuthRoleDeleteRequest { role: words.text()? })
        }
        "auth-role-grant" => {
            let (name, key) = (words.text()?, words.bytes()?);
            let perm = Some(authpb::Permission { perm_type: 2, key, range_end: Bytes::new() });
            AuthCall::RoleGrantPermission(pb::AuthRoleGrantPermissionRequest { name, perm })
        }
        "auth-role-revoke" => {
            let (role, key) = (words.text()?, words.bytes()?);
            AuthCall::RoleRevokePermission(pb::AuthRoleRevokePermissionRequest {
                role,
                key,
                range_end: Bytes::new(),
            })
        }
        other => return Err(format!("the Auth service has no {other}")),
    })
}
