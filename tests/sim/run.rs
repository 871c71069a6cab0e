//! One run: a cluster is founded, clients and trouble for so many simulated seconds, then peace, then the verdict.

use std::time::Duration;

use bytes::Bytes;
use k3s_server::testkit::Random;
use tokio::task::JoinHandle;

use crate::client::{Client, write_once};
use crate::cluster::Cluster;
use crate::history::{Counts, History, Saw};
use crate::machine::raft_options;
use crate::nemesis::{Done, Nemesis, Plan};
use crate::oracle::Checked;
use crate::world::{World, trace};

/// After the last trouble there is a leader within this time, a write within the next, and everybody is equal within the last.
const LEADER_WITHIN: Duration = Duration::from_secs(10);
const WRITE_WITHIN: Duration = Duration::from_secs(15);
const EQUAL_WITHIN: Duration = Duration::from_secs(60);

/// What one run was and did.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    pub(crate) violation: Option<String>,
    pub(crate) fingerprint: u64,
    pub(crate) lines: u64,
    pub(crate) simulated: Duration,
    pub(crate) counts: Counts,
    pub(crate) checked: Checked,
    pub(crate) done: Done,
    pub(crate) messages: u64,
    pub(crate) trace: Option<String>,
}

/// What is wanted to be seen of a run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Watch {
    pub(crate) keep_trace: bool,
    pub(crate) echo: bool,
}

/// Runs `body` in a simulated world of its own on this thread.
pub(crate) fn simulate<F>(
    seed: u64,
    watch: Watch,
    body: impl FnOnce(World) -> F,
) -> (World, F::Output)
where
    F: Future,
{
    crate::entropy::seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap_or_else(|error| panic!("no runtime: {error}"));
    runtime.block_on(async {
        let world = World::new(seed, watch.keep_trace, watch.echo);
        crate::panics::report_to(&world);
        let output = body(world.clone()).await;
        world.end();
        (world, output)
    })
}

/// The run of one seed.
pub(crate) fn seed(seed: u64, duration: Duration, watch: Watch) -> Report {
    let (world, report) = simulate(seed, watch, |world| whole(world, duration));
    Report {
        counts: report.counts,
        checked: report.checked,
        done: report.done,
        messages: report.messages,
        ..self::report(&world)
    }
}

/// What every run tells of its world.
pub(crate) fn report(world: &World) -> Report {
    let (fingerprint, lines) = world.fingerprint();
    Report {
        violation: world.first_violation(),
        fingerprint,
        lines,
        simulated: world.ended(),
        trace: world.kept_trace(),
        ..Report::default()
    }
}

async fn whole(world: World, duration: Duration) -> Report {
    let mut random = world.random();
    let plan = Plan::draw(&mut random);
    trace!(world, "{plan:?}");
    let cluster = Cluster::new(world.clone(), raft_options(), plan.typical_sync);
    let history = History::default();
    let mut report = Report::default();
    if cluster.form(plan.members).await {
        let clients = start_clients(&world, &cluster, &history, &plan);
        let mut nemesis = Nemesis { plan, cluster: cluster.clone(), random, done: Done::default() };
        tokio::select! {
            biased;
            () = world.violated() => {}
            () = nemesis.run(duration) => {}
        }
        nemesis.relent();
        if let Err(what) = recover(&world, &cluster, &history, &clients).await {
            world.violation(|| what);
        }
        report.done = nemesis.done;
    }
    if !world.is_violated()
        && let Err(what) = history.check(&cluster.around.oracle.revisions())
    {
        world.violation(|| what);
    }
    report.counts = history.counts();
    report.checked = cluster.around.oracle.checked();
    report.messages = cluster.around.network.messages();
    report
}

fn start_clients(
    world: &World,
    cluster: &Cluster,
    history: &History,
    plan: &Plan,
) -> Vec<JoinHandle<()>> {
    let client = |number| Client {
        number,
        world: world.clone(),
        cluster: cluster.clone(),
        history: history.clone(),
        random: Random::new(world.random().next_u64()),
        pause: plan.client_pause,
    };
    (0..plan.clients).map(|number| tokio::spawn(client(number).run())).collect()
}

/// Trouble is over: the cluster must come back by itself.
async fn recover(
    world: &World,
    cluster: &Cluster,
    history: &History,
    clients: &[JoinHandle<()>],
) -> Result<(), String> {
    let began = world.elapsed();
    let seconds = |since: Duration| (world.elapsed() - since).as_secs_f64();
    let leader = cluster.wait(LEADER_WITHIN, || cluster.leader()).await;
    if world.is_violated() {
        return Ok(());
    }
    if leader.is_none() {
        return Err(format!(
            "no leader {LEADER_WITHIN:?} after the last trouble: {:?}",
            cluster.statuses()
        ));
    }
    trace!(world, "a leader after {:.3} s", seconds(began));
    replace_those_that_are_out(cluster).await;
    write_through_everybody(world, cluster, history).await?;
    trace!(world, "everybody writes after {:.3} s", seconds(began));
    clients.iter().for_each(JoinHandle::abort);
    let equal = cluster.wait(EQUAL_WITHIN, || cluster.converged()).await;
    if equal.is_none() && !world.is_violated() {
        return Err(format!(
            "not equal {EQUAL_WITHIN:?} after the last trouble: {:?}",
            cluster.statuses()
        ));
    }
    trace!(world, "equal after {:.3} s: {equal:?}", seconds(began));
    cluster.compare_states();
    Ok(())
}

/// Whoever found that its card does not hold what it promised stays off, and is removed.
async fn replace_those_that_are_out(cluster: &Cluster) {
    for machine in cluster.machines().into_iter().filter(|machine| machine.is_out()) {
        if cluster.remove(machine.id, EQUAL_WITHIN).await {
            cluster.discard(machine.id);
        }
    }
}

async fn write_through_everybody(
    world: &World,
    cluster: &Cluster,
    history: &History,
) -> Result<(), String> {
    let deadline = tokio::time::Instant::now() + WRITE_WITHIN;
    for machine in cluster.machines() {
        for attempt in 0.. {
            if world.is_violated() {
                return Ok(());
            }
            if cluster.discard_unless_member(machine.id) {
                break;
            }
            if deadline < tokio::time::Instant::now() {
                return Err(format!(
                    "no write through node {} {WRITE_WITHIN:?} after there was a leader: {:?}",
                    machine.id,
                    cluster.statuses()
                ));
            }
            let Some(live) = machine.live() else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let tag = Bytes::from(format!("last-{}-{attempt}", machine.id));
            if matches!(write_once(&live, history, tag).await?, Saw::Wrote { .. }) {
                break;
            }
        }
    }
    Ok(())
}
