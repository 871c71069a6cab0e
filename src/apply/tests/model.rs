//! The rules once more, in the simplest way that can be right: a whole map for every revision.

use std::collections::BTreeMap;

use pb::range_request::{SortOrder, SortTarget};

use super::*;
use crate::proto::mvccpb::{Event, event::EventType};

type Map = BTreeMap<Bytes, KeyValue>;

/// Everything ever, and what is forgotten of it.
#[derive(Clone)]
pub(super) struct Model {
    /// The state at every revision from 1 on.
    states: Vec<Map>,
    /// The changes of every revision, at the same place.
    pub(super) events: Vec<Vec<Event>>,
    /// The state that is being made, and its changes.
    next: Map,
    changes: Vec<Event>,
    pub(super) leases: BTreeMap<i64, i64>,
    pub(super) compacted: i64,
}

impl Model {
    pub(super) fn new() -> Self {
        Self {
            states: vec![Map::new(), Map::new()],
            events: vec![vec![], vec![]],
            next: Map::new(),
            changes: vec![],
            leases: BTreeMap::new(),
            compacted: -1,
        }
    }

    pub(super) fn revision(&self) -> i64 {
        self.states.len() as i64 - 1
    }

    pub(super) fn state(&self, at: i64) -> &Map {
        &self.states[at as usize]
    }

    pub(super) fn apply(&mut self, command: &Command) -> Result<Reply, Refusal> {
        let reply = match command {
            Command::Put(request) => self.put_alone(request).map(Reply::Put),
            Command::DeleteRange(request) => {
                let response = self.delete(request);
                Ok(Reply::DeleteRange(pb::DeleteRangeResponse { header: None, ..response }))
            }
            Command::Txn(request) => self.txn(request).map(Reply::Txn),
            Command::Compact(request) => self.compact(request.revision),
            Command::LeaseGrant(request) => self.grant(request),
            Command::LeaseRevoke(request) => self.revoke(request.id),
            Command::LeaseCheckpoint(_) | Command::Alarm(_) | Command::Cluster(_) => {
                unreachable!("not generated")
            }
        };
        if !self.changes.is_empty() {
            self.states.push(self.next.clone());
            self.events.push(std::mem::take(&mut self.changes));
        }
        reply
    }

    fn now(&self) -> i64 {
        self.revision() + i64::from(!self.changes.is_empty())
    }

    fn put_alone(&mut self, request: &pb::PutRequest) -> Result<pb::PutResponse, Refusal> {
        if request.lease != 0 && !self.leases.contains_key(&request.lease) {
            return Err(Refusal::LeaseNotFound);
        }
        if (request.ignore_value || request.ignore_lease) && !self.next.contains_key(&request.key) {
            return Err(Refusal::KeyNotFound);
        }
        Ok(pb::PutResponse { header: None, ..self.put(request) })
    }

    fn put(&mut self, request: &pb::PutRequest) -> pb::PutResponse {
        let main = self.revision() + 1;
        let old = self.next.get(&request.key).cloned();
        let mut kv = KeyValue {
            key: request.key.clone(),
            value: request.value.clone(),
            lease: request.lease,
            create_revision: main,
            mod_revision: main,
            version: 1,
        };
        if let Some(old) = &old {
            kv.create_revision = old.create_revision;
            kv.version = old.version + 1;
            if request.ignore_value {
                kv.value = old.value.clone();
            }
            if request.ignore_lease {
                kv.lease = old.lease;
            }
        }
        self.next.insert(kv.key.clone(), kv.clone());
        self.changes.push(Event { r#type: EventType::Put.into(), kv: Some(kv), prev_kv: None });
        pb::PutResponse {
            header: inner_header(Revision::new(main)),
            prev_kv: old.filter(|_| request.prev_kv),
        }
    }

    fn remove(&mut self, key: &Bytes) {
        self.next.remove(key);
        let kv =
            KeyValue { key: key.clone(), mod_revision: self.revision() + 1, ..Default::default() };
        self.changes.push(Event { r#type: EventType::Delete.into(), kv: Some(kv), prev_kv: None });
    }

    fn delete(&mut self, request: &pb::DeleteRangeRequest) -> pb::DeleteRangeResponse {
        let doomed = select(&self.next, &request.key, &request.range_end);
        for kv in &doomed {
            self.remove(&kv.key);
        }
        pb::DeleteRangeResponse {
            header: inner_header(Revision::new(self.now())),
            deleted: doomed.len() as i64,
            prev_kvs: if request.prev_kv { doomed } else { vec![] },
        }
    }

    fn txn(&mut self, request: &pb::TxnRequest) -> Result<pb::TxnResponse, Refusal> {
        let before = self.clone();
        self.check(request)?;
        let response = self.execute(&before, request);
        Ok(pb::TxnResponse { header: None, ..response })
    }

    fn branch<'a>(&self, request: &'a pb::TxnRequest) -> (bool, &'a [pb::RequestOp]) {
        let holds = request.compare.iter().all(|compare| self.holds(compare));
        (holds, if holds { &request.success } else { &request.failure })
    }

    fn check(&self, request: &pb::TxnRequest) -> Result<(), Refusal> {
        for op in self.branch(request).1 {
            match op.request.as_ref().unwrap() {
                Request::RequestRange(range) if self.revision() < range.revision => {
                    return Err(Refusal::FutureRevision);
                }
                Request::RequestRange(range)
                    if range.revision != 0 && range.revision < self.compacted =>
                {
                    return Err(Refusal::Compacted);
                }
                Request::RequestPut(put)
                    if (put.ignore_value || put.ignore_lease)
                        && !self.next.contains_key(&put.key) =>
                {
                    return Err(Refusal::KeyNotFound);
                }
                Request::RequestPut(put)
                    if put.lease != 0 && !self.leases.contains_key(&put.lease) =>
                {
                    return Err(Refusal::LeaseNotFound);
                }
                Request::RequestTxn(nested) => self.check(nested)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn execute(&mut self, before: &Self, request: &pb::TxnRequest) -> pb::TxnResponse {
        let (succeeded, ops) = before.branch(request);
        let responses = ops
            .iter()
            .map(|op| match op.request.as_ref().unwrap() {
                Request::RequestRange(range) => Response::ResponseRange(self.range(range).unwrap()),
                Request::RequestPut(put) => Response::ResponsePut(self.put(put)),
                Request::RequestDeleteRange(delete) => {
                    Response::ResponseDeleteRange(self.delete(delete))
                }
                Request::RequestTxn(nested) => Response::ResponseTxn(self.execute(before, nested)),
            })
            .map(|response| pb::ResponseOp { response: Some(response) })
            .collect();
        pb::TxnResponse { header: Some(pb::ResponseHeader::default()), succeeded, responses }
    }

    fn holds(&self, compare: &pb::Compare) -> bool {
        use pb::compare::{CompareTarget, TargetUnion};
        let mut kvs = select(&self.next, &compare.key, &compare.range_end);
        let target = compare.target();
        if kvs.is_empty() {
            if target == CompareTarget::Value {
                return false;
            }
            kvs.push(KeyValue::default());
        }
        let operand = compare.target_union.clone().unwrap();
        kvs.iter().all(|kv| {
            let order = match &operand {
                TargetUnion::Version(operand) => kv.version.cmp(operand),
                TargetUnion::CreateRevision(operand) => kv.create_revision.cmp(operand),
                TargetUnion::ModRevision(operand) => kv.mod_revision.cmp(operand),
                TargetUnion::Lease(operand) => kv.lease.cmp(operand),
                TargetUnion::Value(operand) => kv.value.cmp(operand),
            };
            match compare.result() {
                pb::compare::CompareResult::Equal => order.is_eq(),
                pb::compare::CompareResult::Greater => order.is_gt(),
                pb::compare::CompareResult::Less => order.is_lt(),
                pb::compare::CompareResult::NotEqual => order.is_ne(),
            }
        })
    }

    pub(super) fn range(&self, request: &pb::RangeRequest) -> Result<pb::RangeResponse, Refusal> {
        if self.now() < request.revision {
            return Err(Refusal::FutureRevision);
        }
        if 0 < request.revision && request.revision < self.compacted {
            return Err(Refusal::Compacted);
        }
        let state = match request.revision {
            ..=0 => &self.next,
            at if self.revision() < at => &self.next,
            at => self.state(at),
        };
        let mut kvs = select(state, &request.key, &request.range_end);
        let count = kvs.len() as i64;
        let mut more = false;
        if request.count_only {
            kvs.clear();
        } else {
            more = self.shape(request, &mut kvs);
        }
        let header = inner_header(Revision::new(self.now()));
        Ok(pb::RangeResponse { header, kvs, more, count })
    }

    /// Filters, sorts and cuts; says whether something was cut.
    fn shape(&self, request: &pb::RangeRequest, kvs: &mut Vec<KeyValue>) -> bool {
        let (target, order) = (request.sort_target(), request.sort_order());
        let filtered = [
            request.min_mod_revision,
            request.max_mod_revision,
            request.min_create_revision,
            request.max_create_revision,
        ] != [0; 4];
        let limit = if request.limit <= 0 { usize::MAX } else { request.limit as usize };
        if order == SortOrder::None && !filtered {
            kvs.truncate(limit.saturating_add(1));
        }
        let bound = |value: i64, none: i64| if value == 0 { none } else { value };
        kvs.retain(|kv| {
            (request.min_mod_revision..=bound(request.max_mod_revision, i64::MAX))
                .contains(&kv.mod_revision)
                && (request.min_create_revision..=bound(request.max_create_revision, i64::MAX))
                    .contains(&kv.create_revision)
        });
        let rank = |kv: &KeyValue| match target {
            SortTarget::Key => (0, Bytes::new()),
            SortTarget::Version => (kv.version, Bytes::new()),
            SortTarget::Create => (kv.create_revision, Bytes::new()),
            SortTarget::Mod => (kv.mod_revision, Bytes::new()),
            SortTarget::Value => (0, kv.value.clone()),
        };
        kvs.sort_by_key(rank);
        if order == SortOrder::Descend {
            kvs.reverse();
            // Equal ones keep the order of their keys.
            if target != SortTarget::Key {
                kvs.chunk_by_mut(|a, b| rank(a) == rank(b)).for_each(<[KeyValue]>::reverse);
            }
        }
        let more = limit < kvs.len();
        kvs.truncate(limit);
        if request.keys_only {
            kvs.iter_mut().for_each(|kv| kv.value = Bytes::new());
        }
        more
    }

    fn compact(&mut self, to: i64) -> Result<Reply, Refusal> {
        if to <= self.compacted {
            return Err(Refusal::Compacted);
        }
        if self.revision() < to {
            return Err(Refusal::FutureRevision);
        }
        self.compacted = to;
        Ok(Reply::Compact(pb::CompactionResponse { header: None }))
    }

    fn grant(&mut self, request: &pb::LeaseGrantRequest) -> Result<Reply, Refusal> {
        if self.leases.contains_key(&request.id) {
            return Err(Refusal::LeaseExists);
        }
        self.leases.insert(request.id, request.ttl);
        let (id, ttl) = (request.id, request.ttl);
        Ok(Reply::LeaseGrant(pb::LeaseGrantResponse { id, ttl, ..Default::default() }))
    }

    fn revoke(&mut self, id: i64) -> Result<Reply, Refusal> {
        if self.leases.remove(&id).is_none() {
            return Err(Refusal::LeaseNotFound);
        }
        for key in self.lease_keys(id) {
            self.remove(&key);
        }
        Ok(Reply::LeaseRevoke(pb::LeaseRevokeResponse { header: None }))
    }

    pub(super) fn lease_keys(&self, id: i64) -> Vec<Bytes> {
        self.next.values().filter(|kv| kv.lease == id).map(|kv| kv.key.clone()).collect()
    }

    /// The events that compaction has left, from `from` on.
    pub(super) fn events_left(&self, from: i64) -> Vec<RevisionEvents> {
        (from.max(self.compacted).max(0)..=self.revision())
            .map(|revision| RevisionEvents {
                revision: Revision::new(revision),
                events: self.events[revision as usize].clone(),
            })
            .filter(|revision| !revision.events.is_empty())
            .collect()
    }
}

fn select(state: &Map, key: &Bytes, end: &Bytes) -> Vec<KeyValue> {
    let inside = |candidate: &Bytes| match end.as_ref() {
        b"" => candidate == key,
        b"\0" => key <= candidate,
        _ => key <= candidate && candidate < end,
    };
    state.values().filter(|kv| inside(&kv.key)).cloned().collect()
}
