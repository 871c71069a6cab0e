//! Runs the plan: the same work on every subject in turn, round after round, so that a busy machine disturbs all alike.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::cluster::Cluster;
use crate::limit::Limit;
use crate::load::watchers::Watchers;
use crate::load::{Recorder, burst, kubernetes, puts};
use crate::measures::{Measures, between};
use crate::plan::{Group, Who, Work};
use crate::rig::Medium;
use crate::subject::Subject;
use crate::sys;

type Failure = Box<dyn Error>;

/// Sparse; only what is written takes memory.
const CARD_BYTES: u64 = 3 << 30;
/// Client calls wait longer than any stall.
const PATIENCE: Duration = Duration::from_secs(15);

/// How long and where.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Pairs per case.
    pub rounds: usize,
    /// Length of one run of most workloads.
    pub seconds: f64,
    /// Length of the idle trace.
    pub idle_seconds: f64,
    /// A directory on a real card, instead of emulated ones.
    pub directory: Option<PathBuf>,
}

/// What came of one case: each subject's rounds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Case {
    pub name: String,
    pub rounds: BTreeMap<String, Vec<Measures>>,
    /// Seconds and ms of every write in the last round, where a plot wants them.
    pub points: BTreeMap<String, Vec<(f64, f64)>>,
}

/// Runs one group; calls `done` after every case.
pub async fn run_group(
    group: &Group,
    subjects: &[Subject],
    settings: &Settings,
    mut done: impl FnMut(Case) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let (fresh, shared): (Vec<Work>, Vec<Work>) =
        group.works.iter().partition(|work| work.wants_fresh_cluster());
    if !shared.is_empty() {
        let mut clusters = Vec::new();
        for subject in compared(subjects) {
            clusters.push(start(group, subject, settings, clusters.len()).await?);
        }
        for cluster in &clusters {
            cluster.wait_until_quiet().await?;
        }
        let card = medium(group, settings, "limit", 0)?;
        let limit = Limit::prepare(&card.path())?;
        slow(&clusters, &card)?;
        for work in shared {
            done(rounds(group, work, &mut clusters, &limit, settings).await?)?;
        }
    }
    for work in fresh {
        let case = match work {
            Work::Idle => idle(group, subjects, settings).await?,
            _ => alone(group, work, subjects, settings).await?,
        };
        done(case)?;
    }
    Ok(())
}

/// etcd and ours as they are; variants take part only in the idle trace.
fn compared(subjects: &[Subject]) -> impl Iterator<Item = &Subject> {
    subjects.iter().filter(|subject| subject.settings.is_empty())
}

fn medium(group: &Group, settings: &Settings, name: &str, seed: u64) -> Result<Medium, Failure> {
    match &settings.directory {
        Some(directory) => Medium::directory(directory, name),
        None => Medium::emulated(name, &group.profile, CARD_BYTES, seed + 1),
    }
}

async fn start(
    group: &Group,
    subject: &Subject,
    settings: &Settings,
    network: usize,
) -> Result<Cluster, Failure> {
    let mut media = Vec::new();
    for server in 1..=group.servers {
        let name = format!("{}-{server}", subject.name);
        // The same seed for both: the same stalls.
        media.push(medium(group, settings, &name, server as u64)?);
    }
    Cluster::start(subject, media, network as u8).await
}

/// Preparations took no time; from now on the cards are cards.
fn slow(clusters: &[Cluster], limit: &Medium) -> Result<(), Failure> {
    let all = clusters.iter().flat_map(|cluster| &cluster.media);
    for medium in all.chain([limit]) {
        sys::sync_file_system(&medium.path())?;
        medium.slow(true)?;
    }
    Ok(())
}

async fn rounds(
    group: &Group,
    work: Work,
    clusters: &mut [Cluster],
    limit: &Limit,
    settings: &Settings,
) -> Result<Case, Failure> {
    let mut case = Case { name: group.case(work), ..Case::default() };
    let long =
        matches!(work, Work::Stall { .. } | Work::LeaderKill | Work::Watch { watchers: 10_000 });
    let count = if long { settings.rounds.min(1) } else { settings.rounds };
    for round in 0..count {
        if let Some(found) = physical(limit, work, settings)? {
            case.rounds.entry("limit".into()).or_default().push(found);
        }
        // Turn and turn about: neither is always first.
        let mut order: Vec<usize> = (0..clusters.len()).collect();
        order.rotate_left(round % clusters.len());
        for index in order {
            let cluster = &mut clusters[index];
            let (measures, recorder) = run(work, cluster, settings)
                .await
                .map_err(|error| format!("{} {}: {error}", case.name, cluster.subject.name))?;
            let name = cluster.subject.name.clone();
            if let Some(points) = recorder.tally().points.take() {
                case.points.insert(name.clone(), points);
            }
            report_failure(&case.name, &name, &recorder);
            case.rounds.entry(name).or_default().push(measures);
        }
    }
    Ok(case)
}

fn report_failure(case: &str, subject: &str, recorder: &Recorder) {
    let tally = recorder.tally();
    if let Some(said) = &tally.first_failure {
        eprintln!("{case} {subject}: {} calls failed, the first: {said}", tally.failed);
    }
}

fn physical(limit: &Limit, work: Work, settings: &Settings) -> Result<Option<Measures>, Failure> {
    let (clients, size) = match work {
        Work::Put { clients, size } => (clients, size),
        Work::Isolated => (1, 256),
        _ => return Ok(None),
    };
    let length = Duration::from_secs_f64((settings.seconds / 2.0).min(4.0));
    let found = limit.measure(clients, size, length)?;
    let measures = [
        ("writes_s", found.writes_s),
        ("p50_ms", found.p50_ms),
        ("p99_ms", found.p99_ms),
        ("flushes_per_write", 1.0 / clients as f64),
        ("bytes_per_write", (clients * (size + 60)).next_multiple_of(4096) as f64 / clients as f64),
    ];
    Ok(Some(measures.map(|(name, value)| (name.to_owned(), value)).into()))
}

/// One run of one workload on one cluster.
async fn run(
    work: Work,
    cluster: &mut Cluster,
    settings: &Settings,
) -> Result<(Measures, Recorder), Failure> {
    let length = Duration::from_secs_f64(settings.seconds);
    match work {
        Work::Stall { who, seconds } => return stall(cluster, who, seconds).await,
        Work::LeaderKill => return leader_kill(cluster).await,
        Work::Watch { watchers } => return watch(cluster, watchers, length).await,
        _ => {}
    }
    let count = match work {
        Work::Put { clients, .. } => clients.min(9),
        _ => 9,
    };
    let connections = cluster.connections(count, PATIENCE).await?;
    let before = cluster.look().await?;
    let recorder = match work {
        Work::Put { clients, size } => puts::closed_loop(&connections, clients, size, length).await,
        Work::Isolated => puts::open_loop(&connections, 5.0, length).await,
        Work::Mixed => puts::mixed(&connections, 32, length).await,
        _ => burst::churn(&connections, (settings.seconds * 20.0) as usize).await,
    };
    let end = Instant::now();
    let after = cluster.look().await?;
    let mut measures = between(&before, &after, &recorder);
    // The look itself takes its time.
    let writes = measures["writes"];
    measures.insert("writes_s".into(), writes / (end - before.at).as_secs_f64());
    if work == Work::Churn {
        measures.insert("seconds".into(), (end - before.at).as_secs_f64());
    }
    Ok((measures, recorder))
}

async fn watch(
    cluster: &Cluster,
    count: usize,
    length: Duration,
) -> Result<(Measures, Recorder), Failure> {
    let mut connections = cluster.connections(9, PATIENCE).await?;
    let idle = cluster.look().await?;
    let watchers = Watchers::open(&mut connections, count).await?;
    let before = cluster.look().await?;
    let (recorder, delivered, seconds) = watchers.deliver(&connections, 8, length).await;
    let after = cluster.look().await?;
    let mut measures = between(&before, &after, &recorder);
    let cpu = |from: usize| after.processes[from].cpu_s - before.processes[from].cpu_s;
    let all: f64 = (0..cluster.len()).map(cpu).sum();
    let rss = |look: &crate::cluster::Look| {
        look.processes.iter().map(|process| process.rss_mib).fold(0.0, f64::max)
    };
    measures.insert("events_s".into(), delivered as f64 / seconds);
    measures.insert("cpu_us_per_event".into(), all * 1e6 / (delivered as f64).max(1.0));
    measures.insert("rss_added_mib".into(), rss(&before) - rss(&idle));
    Ok((measures, recorder))
}

/// 50 writes a second, a third of them through each server; after 5 s cards stall.
async fn stall(cluster: &Cluster, who: Who, seconds: u64) -> Result<(Measures, Recorder), Failure> {
    let connections = cluster.connections(cluster.len(), PATIENCE).await?;
    let before = cluster.look().await?;
    let stalled: Vec<usize> = match who {
        Who::Leader => vec![before.leader],
        Who::Follower => vec![(before.leader + 1) % cluster.len()],
        Who::All => (0..cluster.len()).collect(),
    };
    let writing = puts::open_loop(&connections, 50.0, Duration::from_secs(seconds + 12));
    let stalling = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        for index in &stalled {
            cluster.media[*index].stall(Duration::from_secs(seconds))?;
        }
        Ok::<(), Failure>(())
    };
    let (recorder, result) = tokio::join!(writing, stalling);
    result?;
    let after = cluster.look().await?;
    let mut measures = between(&before, &after, &recorder);
    let attached = stalled
        .iter()
        .filter_map(|index| measures.get(&format!("p99_ms put-{index}")))
        .fold(0.0, |longest: f64, p99| longest.max(*p99));
    measures.insert("attached_p99_ms".into(), attached);
    Ok((measures, recorder))
}

/// 50 writes a second through the two that stay; after 5 s the leader is killed, and comes back later.
async fn leader_kill(cluster: &mut Cluster) -> Result<(Measures, Recorder), Failure> {
    let before = cluster.look().await?;
    let leader = before.leader;
    let mut connections = Vec::new();
    for index in (0..cluster.len()).filter(|index| *index != leader) {
        connections.push(cluster.connect(index, PATIENCE).await?);
    }
    let writing =
        tokio::spawn(
            async move { puts::open_loop(&connections, 50.0, Duration::from_secs(20)).await },
        );
    tokio::time::sleep(Duration::from_secs(5)).await;
    cluster.end(leader, sys::SIGKILL);
    let recorder = writing.await?;
    cluster.launch(leader)?;
    cluster.wait_until_serves(leader).await?;
    let after = cluster.look().await?;
    Ok((between(&before, &after, &recorder), recorder))
}

/// The idle trace, on all subjects at once: it uses a hundredth of the machine, and bytes are exact.
async fn idle(group: &Group, subjects: &[Subject], settings: &Settings) -> Result<Case, Failure> {
    let mut clusters = Vec::new();
    for subject in subjects {
        let cluster = start(group, subject, settings, clusters.len()).await?;
        // As many objects as a small cluster has.
        let connections = cluster.connections(3, PATIENCE).await?;
        puts::fill(&connections, 1_500, 1_500).await;
        cluster.wait_until_quiet().await?;
        for medium in &cluster.media {
            sys::sync_file_system(&medium.path())?;
            medium.slow(true)?;
        }
        clusters.push(cluster);
    }
    // What filling left behind is not idle: snapshots, segments that are filled ahead, checkpoints.
    tokio::time::sleep(Duration::from_secs_f64(settings.idle_seconds.min(30.0))).await;
    let length = Duration::from_secs_f64(settings.idle_seconds);
    let mut before = Vec::new();
    let mut tasks = Vec::new();
    for cluster in &clusters {
        let connections = cluster.connections(3, PATIENCE).await?;
        before.push(cluster.look().await?);
        tasks.push(tokio::spawn(async move { kubernetes::idle(&connections, length).await }));
    }
    let mut case = Case { name: group.case(Work::Idle), ..Case::default() };
    for ((cluster, before), task) in clusters.iter().zip(before).zip(tasks) {
        let recorder = task.await?;
        let after = cluster.look().await?;
        report_failure(&case.name, &cluster.subject.name, &recorder);
        let measures = between(&before, &after, &recorder);
        case.rounds.insert(cluster.subject.name.clone(), vec![measures]);
    }
    Ok(case)
}

/// Work that begins with a new cluster of each subject, one after the other.
async fn alone(
    group: &Group,
    work: Work,
    subjects: &[Subject],
    settings: &Settings,
) -> Result<Case, Failure> {
    let mut case = Case { name: group.case(work), ..Case::default() };
    for subject in compared(subjects) {
        let mut cluster = start(group, subject, settings, 0).await?;
        let measures = match work {
            Work::Memory => memory(&cluster).await,
            _ => restart(&mut cluster).await,
        };
        let measures = measures.map_err(|e| format!("{} {}: {e}", case.name, subject.name))?;
        case.rounds.insert(subject.name.clone(), vec![measures]);
    }
    Ok(case)
}

async fn memory(cluster: &Cluster) -> Result<Measures, Failure> {
    let mut measures = Measures::new();
    let largest = || -> Result<f64, Failure> {
        let mut largest = 0.0_f64;
        for index in 0..cluster.len() {
            largest = largest.max(cluster.process(index)?.rss_mib);
        }
        Ok(largest)
    };
    tokio::time::sleep(Duration::from_secs(5)).await;
    measures.insert("rss_idle_mib".into(), largest()?);
    let mut connections = cluster.connections(9, PATIENCE).await?;
    puts::fill(&connections, 48_828, 2_048).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let filled = largest()?;
    measures.insert("rss_100mb_mib".into(), filled);
    let watchers = Watchers::open(&mut connections, 10_000).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    measures.insert("rss_10k_watchers_added_mib".into(), largest()? - filled);
    drop(watchers);
    Ok(measures)
}

/// From the start of the process to its first answer to a write, with 256 MB of data and nothing of it in memory.
async fn restart(cluster: &mut Cluster) -> Result<Measures, Failure> {
    let connections = cluster.connections(9, PATIENCE).await?;
    let recorder = puts::fill(&connections, 125_000, 2_048).await;
    report_failure("restart", &cluster.subject.name, &recorder);
    drop(connections);
    let index = 0;
    let mut measures = Measures::new();
    for (name, signal) in [("clean_start_s", sys::SIGTERM), ("killed_start_s", sys::SIGKILL)] {
        cluster.end(index, signal);
        sys::sync_file_system(&cluster.media[index].path())?;
        cluster.media[index].forget_cache()?;
        cluster.media[index].slow(true)?;
        cluster.launch(index)?;
        let taken = cluster.wait_until_serves(index).await?;
        measures.insert(name.to_owned(), taken.as_secs_f64());
        measures.insert(name.replace("start", "cpu"), cluster.process(index)?.cpu_s);
        cluster.media[index].slow(false)?;
    }
    measures.insert("rss_mib".into(), cluster.process(index)?.rss_mib);
    Ok(measures)
}
