//! Servers of one subject that form a cluster, each with its data on a medium of its own.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};

use crate::card::Counters;
use crate::rig::{self, Medium};
use crate::subject::{ClientFiles, Subject};
use crate::sys;

/// How long a server may take to come up, on the slowest card.
const START_LIMIT: Duration = Duration::from_secs(120);

/// A running cluster. Dropping it stops the servers and takes the cards away.
pub struct Cluster {
    pub subject: Subject,
    addresses: Vec<String>,
    files: ClientFiles,
    shared: PathBuf,
    processes: Vec<Option<Child>>,
    pub media: Vec<Medium>,
}

/// What the system counts for one server.
#[derive(Clone, Copy, Debug, Default)]
pub struct Process {
    /// Processor seconds used.
    pub cpu_s: f64,
    /// Memory held.
    pub rss_mib: f64,
}

/// One look at everything that is counted.
#[derive(Clone, Debug)]
pub struct Look {
    pub at: Instant,
    pub cards: Vec<Counters>,
    pub processes: Vec<Process>,
    pub term: u64,
    pub leader: usize,
}

impl Cluster {
    /// Starts one server on each medium, and waits until they serve. `network` keeps clusters apart.
    pub async fn start(
        subject: &Subject,
        media: Vec<Medium>,
        network: u8,
    ) -> Result<Self, Box<dyn Error>> {
        let addresses: Vec<String> =
            (1..=media.len()).map(|number| subject.address(network, number)).collect();
        let shared = rig::scratch().join(format!("cluster-{}-{network}", subject.name));
        fs::create_dir_all(&shared)?;
        let files = subject.prepare(&shared, &addresses, &media[0].path())?;
        let processes = media.iter().map(|_| None).collect();
        let mut cluster =
            Self { subject: subject.clone(), addresses, files, shared, processes, media };
        for index in 0..cluster.media.len() {
            cluster.launch(index)?;
            if index == 0 && cluster.subject.kind == crate::subject::Kind::Ours {
                // The others join the first; etcd's members wait for each other instead.
                cluster.wait_until_serves(0).await?;
            }
        }
        for index in 0..cluster.media.len() {
            cluster.wait_until_serves(index).await?;
        }
        Ok(cluster)
    }

    /// Starts server `index`, for the first time or again.
    pub fn launch(&mut self, index: usize) -> Result<(), Box<dyn Error>> {
        let data = self.media[index].path();
        let first = self.media[0].path();
        let mut command =
            self.subject.command(index + 1, &self.addresses, &data, &self.shared, &first)?;
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log(index))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.processes[index] = Some(command.spawn()?);
        Ok(())
    }

    fn log(&self, index: usize) -> PathBuf {
        self.shared.join(format!("{}.log", index + 1))
    }

    /// Ends server `index`, as systemd or as a power cut would.
    pub fn end(&mut self, index: usize, signal: i32) {
        if let Some(mut process) = self.processes[index].take() {
            sys::signal(process.id(), signal);
            let gone =
                sys::wait_while(Duration::from_secs(30), || matches!(process.try_wait(), Ok(None)));
            if !gone {
                drop(process.kill());
                drop(process.wait());
            }
        }
    }

    /// Waits until a write through server `index` succeeds; how long that took.
    pub async fn wait_until_serves(&mut self, index: usize) -> Result<Duration, Box<dyn Error>> {
        let begin = Instant::now();
        loop {
            if let Some(process) = &mut self.processes[index]
                && let Some(status) = process.try_wait()?
            {
                return Err(
                    format!("{} ended: {status}\n{}", self.subject.name, self.tail(index)).into()
                );
            }
            if self.files.ca.exists() && self.files.certificate.exists() {
                let one = self.try_put(index).await;
                match one {
                    Ok(()) => return Ok(begin.elapsed()),
                    Err(error) if begin.elapsed() > START_LIMIT => {
                        let log = self.tail(index);
                        return Err(format!(
                            "{} does not serve: {error}\n{log}",
                            self.subject.name
                        )
                        .into());
                    }
                    Err(_) => {}
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn try_put(&self, index: usize) -> Result<(), Box<dyn Error>> {
        let limit = Duration::from_secs(5);
        tokio::time::timeout(limit, async {
            let mut client = self.connect(index, limit).await?;
            client.put("started", "yes", None).await?;
            Ok(())
        })
        .await?
    }

    fn tail(&self, index: usize) -> String {
        let log = fs::read_to_string(self.log(index)).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// How many servers there are.
    pub fn len(&self) -> usize {
        self.media.len()
    }

    /// A client of server `index` only.
    pub async fn connect(&self, index: usize, timeout: Duration) -> Result<Client, Box<dyn Error>> {
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(fs::read(&self.files.ca)?))
            .identity(Identity::from_pem(
                fs::read(&self.files.certificate)?,
                fs::read(&self.files.key)?,
            ));
        let options = ConnectOptions::new()
            .with_tls(tls)
            .with_connect_timeout(Duration::from_secs(5))
            .with_timeout(timeout);
        let url = format!("https://{}:2379", self.addresses[index]);
        Ok(Client::connect([url], Some(options)).await?)
    }

    /// `count` connections, taking turns over the servers that run.
    pub async fn connections(
        &self,
        count: usize,
        timeout: Duration,
    ) -> Result<Vec<Client>, Box<dyn Error>> {
        let running: Vec<usize> =
            (0..self.len()).filter(|index| self.processes[*index].is_some()).collect();
        let mut clients = Vec::new();
        for index in 0..count {
            clients.push(self.connect(running[index % running.len()], timeout).await?);
        }
        Ok(clients)
    }

    /// Waits until the cards are: after a start, servers fill and preallocate files for a while.
    pub async fn wait_until_quiet(&self) -> Result<(), Box<dyn Error>> {
        const QUIET_BYTES: u64 = 64 << 10;
        let end = Instant::now() + START_LIMIT;
        let mut quiet = 0;
        let mut last = 0;
        while quiet < 3 && Instant::now() < end {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let mut bytes = 0;
            for medium in &self.media {
                sys::sync_file_system(&medium.path())?;
                bytes += medium.counters()?.bytes;
            }
            quiet = if bytes - last < QUIET_BYTES { quiet + 1 } else { 0 };
            last = bytes;
        }
        Ok(())
    }

    /// The highest term anybody knows, and who leads.
    pub async fn term_and_leader(&self) -> Result<(u64, usize), Box<dyn Error>> {
        let (mut term, mut leader) = (0, 0);
        for index in 0..self.len() {
            if self.processes[index].is_none() {
                continue;
            }
            let mut client = self.connect(index, Duration::from_secs(10)).await?;
            let status = client.status().await?;
            let own = status.header().map_or(0, etcd_client::ResponseHeader::member_id);
            term = term.max(status.raft_term());
            if own == status.leader() {
                leader = index;
            }
        }
        Ok((term, leader))
    }

    /// Looks at everything that is counted, after writing what the kernel still holds.
    pub async fn look(&self) -> Result<Look, Box<dyn Error>> {
        for medium in &self.media {
            sys::sync_file_system(&medium.path())?;
        }
        let (term, leader) = self.term_and_leader().await?;
        let cards = self.media.iter().map(Medium::counters).collect::<Result<_, _>>()?;
        let processes =
            (0..self.len()).map(|index| self.process(index)).collect::<Result<_, _>>()?;
        Ok(Look { at: Instant::now(), cards, processes, term, leader })
    }

    /// What server `index` uses of the machine; nothing if it does not run.
    pub fn process(&self, index: usize) -> Result<Process, Box<dyn Error>> {
        let Some(process) = &self.processes[index] else { return Ok(Process::default()) };
        let dir = Path::new("/proc").join(process.id().to_string());
        let stat = fs::read_to_string(dir.join("stat"))?;
        let fields: Vec<&str> =
            stat.rsplit_once(')').ok_or("no name in stat")?.1.split_whitespace().collect();
        let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        let status = fs::read_to_string(dir.join("status"))?;
        let rss = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.split_whitespace().next())
            .ok_or("the server ended")?;
        Ok(Process {
            cpu_s: ticks as f64 / sys::ticks_per_second(),
            rss_mib: rss.parse::<f64>()? / 1024.0,
        })
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for index in 0..self.processes.len() {
            if let Some(process) = &self.processes[index] {
                sys::signal(process.id(), sys::SIGTERM);
            }
        }
        for index in 0..self.processes.len() {
            self.end(index, sys::SIGTERM);
        }
        drop(fs::remove_dir_all(&self.shared));
    }
}
