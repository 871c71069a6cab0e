//! What is run: cases, each a workload on a kind of card with a number of servers.

use std::fmt;

/// Whose card stalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Leader,
    Follower,
    All,
}

/// What the clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Closed loop of so many clients with values of so many bytes.
    Put { clients: usize, size: usize },
    /// Five writes a second, far apart: what a write costs alone.
    Isolated,
    /// 32 clients that read and write.
    Mixed,
    /// 16 pods at a time come and go.
    Churn,
    /// So many watchers, eight writers.
    Watch { watchers: usize },
    /// 50 writes a second to all servers while a card pauses.
    Stall { who: Who, seconds: u64 },
    /// 50 writes a second while the leader is killed.
    LeaderKill,
    /// An idle Kubernetes cluster. On clusters of its own, all at the same time.
    Idle,
    /// Memory when idle, with 100 MB of data, with 10,000 watchers. On clusters of its own.
    Memory,
    /// Start with 256 MB of data, after a clean stop and after a kill. On clusters of its own.
    Restart,
}

impl Work {
    /// Whether it wants a cluster that has done nothing before.
    pub fn wants_fresh_cluster(self) -> bool {
        matches!(self, Self::Idle | Self::Memory | Self::Restart)
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Put { clients, size: 256 } => write!(f, "put-{clients}"),
            Self::Put { clients, size } => write!(f, "put-{clients}-{size}B"),
            Self::Isolated => write!(f, "isolated"),
            Self::Mixed => write!(f, "mixed"),
            Self::Churn => write!(f, "churn"),
            Self::Watch { watchers } => write!(f, "watch-{watchers}"),
            Self::Stall { who, seconds } => {
                write!(f, "stall-{}-{seconds}s", format!("{who:?}").to_lowercase())
            }
            Self::LeaderKill => write!(f, "leader-kill"),
            Self::Idle => write!(f, "idle"),
            Self::Memory => write!(f, "memory"),
            Self::Restart => write!(f, "restart"),
        }
    }
}

/// One card profile and number of servers, and what is done there in order.
#[derive(Clone, Debug)]
pub struct Group {
    pub profile: String,
    pub servers: usize,
    pub works: Vec<Work>,
}

impl Group {
    /// The name of a case: `typical-a1/3/put-64`.
    pub fn case(&self, work: Work) -> String {
        format!("{}/{}/{work}", self.profile, self.servers)
    }
}

const CLIENTS: [usize; 4] = [1, 16, 64, 256];

fn puts(size: usize) -> impl Iterator<Item = Work> {
    CLIENTS.into_iter().map(move |clients| Work::Put { clients, size })
}

/// Everything on emulated cards.
pub fn everything() -> Vec<Group> {
    let mut main: Vec<Work> = vec![Work::Isolated];
    main.extend(puts(256).chain(puts(2048)));
    main.extend([Work::Mixed, Work::Churn]);
    main.extend([1_000, 10_000].map(|watchers| Work::Watch { watchers }));
    for who in [Who::Leader, Who::Follower, Who::All] {
        main.extend([1, 3, 7, 12].map(|seconds| Work::Stall { who, seconds }));
    }
    main.extend([Work::LeaderKill, Work::Idle, Work::Memory, Work::Restart]);
    let busy = CLIENTS[2..].iter().map(|clients| Work::Put { clients: *clients, size: 256 });
    let busy: Vec<Work> = busy.collect();
    let group = |profile: &str, servers, works| Group { profile: profile.into(), servers, works };
    let mut alone: Vec<Work> = vec![Work::Isolated];
    alone.extend(puts(256));
    alone.extend([Work::Idle, Work::Restart]);
    vec![
        group("typical-a1", 3, main),
        group("typical-a1", 1, alone),
        group("good-a2", 3, puts(256).collect()),
        group("bad-old", 3, puts(256).chain([Work::Idle]).collect()),
        group("none", 3, busy.clone()),
        group("none", 1, busy),
    ]
}

/// What a real card can be asked: one server, because all servers of one machine would share its card.
pub fn on_a_real_card() -> Vec<Group> {
    let mut works = vec![Work::Isolated];
    works.extend(puts(256).chain(puts(2048)));
    works.extend([Work::Mixed, Work::Churn, Work::Watch { watchers: 1_000 }]);
    works.extend([Work::Idle, Work::Memory, Work::Restart]);
    vec![Group { profile: "real".into(), servers: 1, works }]
}

/// Those whose case name contains one of the words; all without words.
pub fn only(groups: Vec<Group>, words: &[String]) -> Vec<Group> {
    let wanted = |group: &Group, work: Work| {
        let case = format!("{}/", group.case(work));
        words.is_empty() || words.iter().any(|word| case.contains(word.as_str()))
    };
    groups
        .into_iter()
        .map(|group| {
            let works = group.works.iter().copied().filter(|work| wanted(&group, *work)).collect();
            Group { works, ..group }
        })
        .filter(|group| !group.works.is_empty())
        .collect()
}
