//! Decides what of the database file and its table may be believed after a clean stop, a crash or damage.
//!
//! # Shape
//!
//! | found | then |
//! |---|---|
//! | no database file, or an empty one | a new one |
//! | a table of this file | its last epoch's blocks are taken as found; all others are checked when read |
//! | a header block that is neither the old nor the new one | put back from the table's copy |
//! | a header without redb's magic that the table knows | its creation was cut off: begin again |
//! | redb's magic without our tag, and a block that the table does not know | another file |
//! | no table, a damaged one, or another file's | redb's integrity check on a scratch view, then a new table |
//! | a length the table cannot explain | refused |

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};

use thiserror::Error;
use tokio::sync::{Notify, watch};

use crate::env::{DiskFile, Env, Open};
use crate::limits::STATE_CACHE_BYTES;

use super::drain::TableFile;
use super::overlay::{BLOCK_BYTES, Overlay, ZERO_CRC, offset_of};
use super::table::{HEADER_BYTES, HeaderCopy, Table, Tag};
use super::{
    Backend, DamagedBlock, Drain, Epoch, OpenReport, Options, Progress, Reports, Shared, State,
    Stats, TableOrigin, parent, table_paths,
};

/// How a redb file begins.
const REDB_MAGIC: [u8; 9] = *b"redb\x1A\x0A\xA9\x0D\x0A";

/// A table larger than this is not one: it would describe 64 GiB.
const TABLE_BYTES_MAX: u64 = 64 << 20;

/// Why the state file cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The kernel said no.
    #[error("cannot open the state file: {0}")]
    Io(#[from] io::Error),
    /// The file is not as long as the table says.
    #[error("state file damaged: {found} blocks long, expected {expected}")]
    Length {
        /// Blocks found.
        found: u32,
        /// Blocks the table describes.
        expected: u32,
    },
    /// The file's length is not a whole number of blocks, or beyond 16 TiB.
    #[error("not a state file: {0} bytes long, expected a multiple of 4096")]
    NotBlocks(u64),
    /// The table is lost and the database does not pass redb's integrity check.
    #[error("state file damaged: its checksum table is lost and {0}")]
    Unverified(String),
    /// The header block is damaged and there is no copy of it.
    #[error(transparent)]
    Damaged(#[from] DamagedBlock),
}

/// Why a new table had to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RebuildReason {
    /// There is none.
    Missing,
    /// Neither file can be read, or epochs the database has seen are missing from it.
    Damaged,
    /// It belongs to another database file.
    Foreign,
}

/// What `open` worked out.
struct Recovered {
    id: u64,
    overlay: Overlay,
    report: OpenReport,
    /// The table file to go on with, or where to write a new snapshot.
    table: Option<(usize, u64, u64)>,
    next_slot: usize,
    header: Option<HeaderCopy>,
}

/// See [`Backend::open`].
pub(super) fn open(
    env: &Env,
    path: &Path,
    options: Options,
    reports: Reports,
) -> Result<(Backend, Drain), OpenError> {
    let paths = table_paths(path);
    let file = if env.disk.exists(path)? {
        env.disk.open(path, Open::Write)?
    } else {
        let file = env.disk.open(path, Open::Create)?;
        env.disk.sync_dir(parent(path))?;
        file
    };
    let tables = [read_table(env, &paths[0])?, read_table(env, &paths[1])?];
    let recovered = recover(env, &file, &tables)?;

    let [first, second] = &paths;
    let table_files = [open_table(env, first)?, open_table(env, second)?];
    let table = recovered.table.map(|(slot, start, end)| TableFile {
        file: table_files[slot].clone(),
        start,
        end,
    });
    let shared = shared(file, recovered.id, recovered.overlay, recovered.report, options, reports);
    let drain = Drain {
        shared: shared.clone(),
        env: env.clone(),
        table_files,
        table,
        next_slot: recovered.next_slot,
        header: recovered.header,
        finished: false,
    };
    Ok((Backend { shared }, drain))
}

/// Opens a table file, making an empty one if it is not there.
fn open_table(env: &Env, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
    if env.disk.exists(path)? {
        return env.disk.open(path, Open::Write);
    }
    let file = env.disk.open(path, Open::Create)?;
    env.disk.sync_dir(parent(path))?;
    Ok(file)
}

fn shared(
    file: Arc<dyn DiskFile>,
    id: u64,
    overlay: Overlay,
    report: OpenReport,
    options: Options,
    reports: Reports,
) -> Arc<Shared> {
    let durable = overlay.last_sealed();
    Arc::new(Shared {
        options,
        id,
        report,
        file,
        state: Mutex::new(State {
            overlay,
            stats: Stats::default(),
            closing: false,
            threaded: false,
            waiting: false,
            retired: false,
            stopped: None,
        }),
        drained: Condvar::new(),
        work: Notify::new(),
        room: Notify::new(),
        progress: watch::Sender::new(Progress { durable, ..Progress::default() }),
        reports,
    })
}

/// What a table file turned out to be.
enum Found {
    Nothing,
    Damaged,
    Table(Box<Table>),
}

fn read_table(env: &Env, path: &Path) -> io::Result<Found> {
    if !env.disk.exists(path)? {
        return Ok(Found::Nothing);
    }
    let file = env.disk.open(path, Open::Read)?;
    let len = file.len()?;
    if len == 0 {
        // Created, and then the power went.
        return Ok(Found::Nothing);
    }
    let Some(len) = usize::try_from(len.min(TABLE_BYTES_MAX)).ok() else {
        return Ok(Found::Damaged);
    };
    let mut bytes = vec![0; len];
    file.read_at(&mut bytes, 0)?;
    Ok(Table::decode(&bytes).map_or(Found::Damaged, |table| Found::Table(Box::new(table))))
}

fn recover(
    env: &Env,
    file: &Arc<dyn DiskFile>,
    tables: &[Found; 2],
) -> Result<Recovered, OpenError> {
    let bytes = file.len()?;
    let len = u32::try_from(bytes / BLOCK_BYTES as u64)
        .ok()
        .filter(|_| bytes.is_multiple_of(BLOCK_BYTES as u64))
        .ok_or(OpenError::NotBlocks(bytes))?;
    let mut header = vec![0; BLOCK_BYTES];
    if len != 0 {
        file.read_at(&mut header, 0)?;
    }
    let tag = Tag::read(&header);
    let is_redb = header.starts_with(&REDB_MAGIC);
    // New epochs outrank whatever the files on the card know of.
    let last = newest(tables).max(tag.map(|tag| tag.epoch).unwrap_or_default());

    match choose(tables, tag.filter(|_| is_redb)) {
        Ok((slot, table)) => {
            // A header newer than the table: the table's newest record is damaged.
            let lost = tag.is_some_and(|tag| tag.id == table.id && table.newest() < tag.epoch);
            if lost {
                return rebuild(env, file, len, &header, last, RebuildReason::Damaged);
            }
            // A redb file that this module has never written to.
            if is_redb && tag.is_none() && !has_torn_header(&**file, len, table)? {
                return rebuild(env, file, len, &header, last, RebuildReason::Foreign);
            }
            load(&**file, len, &header, slot, table)
        }
        Err(_) if len == 0 => Ok(begin(env.entropy.next_u64(), Vec::new(), last, 0)),
        Err(reason) => rebuild(env, file, len, &header, last, reason),
    }
}

/// Whether a header without our tag is what a power cut left of the table's last epoch, and not another file's: a sector
/// need not be written whole, and redb's magic may arrive without the rest. A block that no epoch was writing decides.
fn has_torn_header(file: &dyn DiskFile, len: u32, table: &Table) -> io::Result<bool> {
    let header_changed = table
        .last
        .as_ref()
        .is_some_and(|last| last.changes.first().is_some_and(|(at, _)| *at == 0));
    let Some(estimate) = Estimate::new(table, len).ok().filter(|_| header_changed) else {
        return Ok(false);
    };
    let doubtful = estimate.doubtful();
    let is_witness =
        |at: &u32| !doubtful.contains(at) && estimate.actual[*at as usize] != *ZERO_CRC;
    let Some(witness) = (1..len).find(is_witness) else { return Ok(true) };
    let mut block = vec![0; BLOCK_BYTES];
    file.read_at(&mut block, offset_of(witness))?;
    Ok(crc32c::crc32c(&block) == estimate.actual[witness as usize])
}

/// The table to use: of this file, with the newest record, and of two such the one with fewer doubts.
fn choose(tables: &[Found; 2], tag: Option<Tag>) -> Result<(usize, &Table), RebuildReason> {
    let mut reason = RebuildReason::Missing;
    let mut best: Option<(usize, &Table)> = None;
    for (slot, found) in tables.iter().enumerate() {
        match found {
            Found::Nothing => {}
            Found::Damaged => reason = RebuildReason::Damaged,
            Found::Table(table) if tag.is_some_and(|tag| tag.id != table.id) => {
                reason = RebuildReason::Foreign;
            }
            Found::Table(table) => {
                let rank = |table: &Table| (table.newest(), table.base);
                if best.is_none_or(|(_, best)| rank(best) < rank(table)) {
                    best = Some((slot, table));
                }
            }
        }
    }
    best.ok_or(reason)
}

/// The newest epoch any table names, so that a new one outranks them all.
fn newest(tables: &[Found; 2]) -> Epoch {
    let newest = tables.iter().filter_map(|found| match found {
        Found::Table(table) => Some(table.newest()),
        Found::Nothing | Found::Damaged => None,
    });
    newest.max().unwrap_or_default()
}

/// Begins a new database in a file of these checksums, whatever is in it.
fn begin(id: u64, crcs: Vec<u32>, last: Epoch, next_slot: usize) -> Recovered {
    let mut overlay = Overlay::new(crcs, last);
    overlay.set_len(0);
    Recovered {
        id,
        overlay,
        report: OpenReport { table: TableOrigin::New, torn_blocks: 0, header_restored: false },
        table: None,
        next_slot,
        header: None,
    }
}

/// The database file as its table knows it, before and after the last record, and as it is.
struct Estimate<'a> {
    before: &'a Table,
    after: Table,
    /// Checksums of the file as it is, as far as they are facts.
    actual: Vec<u32>,
    torn_blocks: u32,
}

impl<'a> Estimate<'a> {
    fn new(table: &'a Table, len: u32) -> Result<Self, OpenError> {
        let mut after = table.clone();
        after.fold_last();
        let before_len = u32::try_from(table.crcs.len()).unwrap_or(u32::MAX);
        let legal = match &table.last {
            None => len == before_len,
            Some(last) => [before_len, last.floor, last.len].contains(&len),
        };
        if !legal {
            let expected = u32::try_from(after.crcs.len()).unwrap_or(u32::MAX);
            return Err(OpenError::Length { found: len, expected });
        }
        let mut actual = after.crcs.clone();
        actual.resize(len as usize, 0);
        Ok(Self { before: table, after, actual, torn_blocks: 0 })
    }

    /// Blocks whose bytes the cut-off epoch leaves open.
    fn doubtful(&self) -> Vec<u32> {
        let Some(last) = &self.before.last else { return Vec::new() };
        let len = u32::try_from(self.actual.len()).unwrap_or(u32::MAX);
        let changed = last.changes.iter().map(|(block, _)| *block);
        changed.filter(|block| *block < last.floor.min(len)).chain(last.floor..len).collect()
    }

    /// Whether a crash at any moment of the last record's epoch may have left this.
    fn is_whole(&self, block: u32, crc: u32) -> bool {
        let at = block as usize;
        let zeros = self.before.last.as_ref().is_some_and(|last| last.floor <= block);
        self.before.crcs.get(at) == Some(&crc)
            || self.after.crcs.get(at) == Some(&crc)
            || (zeros && crc == *ZERO_CRC)
    }

    /// Takes the doubtful blocks, except the header, as they are.
    fn adopt(&mut self, file: &dyn DiskFile) -> io::Result<()> {
        let mut block = vec![0; BLOCK_BYTES];
        for number in self.doubtful().into_iter().filter(|number| *number != 0) {
            file.read_at(&mut block, offset_of(number))?;
            let crc = crc32c::crc32c(&block);
            self.torn_blocks += u32::from(!self.is_whole(number, crc));
            self.actual[number as usize] = crc;
        }
        Ok(())
    }

    /// Whether redb had not finished making the database: it writes its magic last.
    fn is_unborn(&self, header: &[u8]) -> bool {
        let has_magic = |copy: Option<HeaderCopy>| copy.is_some_and(|c| c.starts_with(&REDB_MAGIC));
        let may_have_been_born = has_magic(self.after.header);
        !has_magic(self.before.header)
            && !header.starts_with(&REDB_MAGIC)
            && (!may_have_been_born || self.is_whole(0, crc32c::crc32c(header)))
    }
}

fn load(
    file: &dyn DiskFile,
    len: u32,
    header: &[u8],
    slot: usize,
    table: &Table,
) -> Result<Recovered, OpenError> {
    let newest = table.newest();
    let mut estimate = Estimate::new(table, len)?;
    estimate.adopt(file)?;
    let found = crc32c::crc32c(header);
    if len == 0 || estimate.is_unborn(header) {
        estimate.actual.first_mut().into_iter().for_each(|crc| *crc = found);
        return Ok(begin(table.id, estimate.actual, newest, 1 - slot));
    }

    let whole = estimate.is_whole(0, found);
    let expected = estimate.after.crcs.first().copied().unwrap_or_default();
    // A damaged header keeps its place in the table under the checksum it should have, so that a second
    // crash before it is rewritten finds it damaged again.
    estimate.actual[0] = if whole { found } else { expected };
    let header_copy = if whole && found != expected { table.header } else { estimate.after.header };
    // Another record would make facts of the last one's checksums: allowed only if they are.
    let keep = estimate.actual == estimate.after.crcs;
    let mut overlay = Overlay::new(estimate.actual, newest);
    if !whole {
        let Some(copy) = header_copy else {
            return Err(DamagedBlock { block: 0, offset: 0, found, expected }.into());
        };
        write_header(&mut overlay, table.id, &copy);
    }
    let report = OpenReport {
        table: TableOrigin::Loaded,
        torn_blocks: estimate.torn_blocks,
        header_restored: !whole,
    };
    let position = keep.then_some((slot, table.records_start, table.end));
    Ok(Recovered {
        id: table.id,
        overlay,
        report,
        table: position,
        next_slot: 1 - slot,
        header: header_copy,
    })
}

fn write_header(overlay: &mut Overlay, id: u64, copy: &HeaderCopy) {
    let mut block = copy.to_vec();
    block.resize(BLOCK_BYTES, 0);
    Tag { id, epoch: overlay.open_epoch() }.stamp(&mut block);
    overlay.write(0, block.into());
}

/// Makes a new table for a database that redb finds sound.
fn rebuild(
    env: &Env,
    file: &Arc<dyn DiskFile>,
    len: u32,
    header: &[u8],
    last: Epoch,
    reason: RebuildReason,
) -> Result<Recovered, OpenError> {
    let crcs = checksums(&**file, len)?;
    verify(file, crcs.clone())?;

    let id = env.entropy.next_u64();
    let mut overlay = Overlay::new(crcs, last);
    let mut copy = [0; HEADER_BYTES];
    copy.copy_from_slice(&header[..HEADER_BYTES]);
    write_header(&mut overlay, id, &copy);
    let table = TableOrigin::Rebuilt(reason);
    Ok(Recovered {
        id,
        overlay,
        report: OpenReport { table, torn_blocks: 0, header_restored: false },
        table: None,
        next_slot: 0,
        header: Some(copy),
    })
}

fn checksums(file: &dyn DiskFile, len: u32) -> io::Result<Vec<u32>> {
    let mut crcs = Vec::with_capacity(len as usize);
    let mut blocks = vec![0; 32 * BLOCK_BYTES];
    let mut next = 0;
    while next < len {
        let count = (len - next).min(32);
        let bytes = &mut blocks[..count as usize * BLOCK_BYTES];
        file.read_at(bytes, offset_of(next))?;
        crcs.extend(bytes.chunks_exact(BLOCK_BYTES).map(crc32c::crc32c));
        next += count;
    }
    Ok(crcs)
}

/// Lets redb check every page it can reach. Whatever redb writes meanwhile, its recovery included, stays in
/// memory and is forgotten: the file is looked at, not touched.
fn verify(file: &Arc<dyn DiskFile>, crcs: Vec<u32>) -> Result<(), OpenError> {
    let report = OpenReport { table: TableOrigin::Loaded, torn_blocks: 0, header_restored: false };
    let overlay = Overlay::new(crcs, Epoch::default());
    let (options, reports) = (Options::default(), Reports::default());
    let scratch = Backend { shared: shared(file.clone(), 0, overlay, report, options, reports) };
    let check = move || {
        let mut database = redb::Database::builder()
            .set_cache_size(STATE_CACHE_BYTES)
            .create_with_backend(scratch)?;
        database.check_integrity()
    };
    // redb reads some of its own tables before it verifies them, and asserts what it finds there.
    match catch_unwind(AssertUnwindSafe(check)) {
        Ok(Ok(true)) => Ok(()),
        Ok(Ok(false)) => Err(OpenError::Unverified("redb had to repair it".to_owned())),
        Ok(Err(error)) => Err(OpenError::Unverified(error.to_string())),
        Err(_) => Err(OpenError::Unverified("redb cannot read it".to_owned())),
    }
}
