//! The FUSE file system with one file, `disk.img`, whose requests take as long as a card's.
//!
//! # Shape
//! The FUSE thread charges each request to the card and knows at once when it will be done; a second thread answers when that time
//! has come. Requests finish in order, as on a card with one queue slot.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, SessionACL,
    TimeOrNow, WriteFlags,
};

use super::state::State;
use crate::sys;

/// Name of the one file.
pub const IMAGE: &str = "disk.img";

const ROOT_INODE: u64 = 1;
const IMAGE_INODE: u64 = 2;
const FOREVER: Duration = Duration::from_secs(3_600);

/// An answer that waits for its time.
enum Answer {
    Written(ReplyWrite, u32),
    Read(ReplyData, Vec<u8>),
    Flushed(ReplyEmpty, u64),
    Done(ReplyEmpty),
}

/// The card, shared by the thread that takes requests, the one that answers, and the control socket.
pub struct Card {
    state: Mutex<State>,
    answers: Mutex<VecDeque<(Instant, Answer)>>,
    wake: Condvar,
    /// The sparse file behind it.
    pub image: File,
}

impl Card {
    pub fn new(state: State, image: File) -> Self {
        Self { state: Mutex::new(state), answers: Mutex::default(), wake: Condvar::new(), image }
    }

    /// The state. A thread that panicked ends the process, so a poisoned lock is never seen.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answers(&self) -> MutexGuard<'_, VecDeque<(Instant, Answer)>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(&self, due: Instant, slow: bool, answer: Answer) {
        let mut answers = self.answers();
        if !slow && answers.is_empty() {
            drop(answers);
            self.complete(answer);
            return;
        }
        answers.push_back((due, answer));
        drop(answers);
        self.wake.notify_one();
    }

    fn complete(&self, answer: Answer) {
        let mut state = self.state();
        let cut = state.cut;
        if let Answer::Flushed(_, sequence) = &answer {
            state.durable_up_to(*sequence);
        }
        drop(state);
        match answer {
            Answer::Written(reply, _) if cut => reply.error(Errno::EIO),
            Answer::Read(reply, _) if cut => reply.error(Errno::EIO),
            Answer::Flushed(reply, _) | Answer::Done(reply) if cut => reply.error(Errno::EIO),
            Answer::Written(reply, length) => reply.written(length),
            Answer::Read(reply, data) => reply.data(&data),
            Answer::Flushed(reply, _) | Answer::Done(reply) => reply.ok(),
        }
    }

    /// The second thread: answers in order, each in its time.
    fn answer_in_time(&self) {
        sys::exact_sleeps();
        loop {
            let due = {
                let mut answers = self.answers();
                loop {
                    match answers.front() {
                        Some((due, _)) => break *due,
                        None => {
                            answers =
                                self.wake.wait(answers).unwrap_or_else(PoisonError::into_inner);
                        }
                    }
                }
            };
            // In pieces: a power cut does not wait for a long stall.
            while Instant::now() < due && !self.state().cut {
                sys::sleep_until(due.min(Instant::now() + Duration::from_millis(50)));
            }
            let next = self.answers().pop_front();
            if let Some((_, answer)) = next {
                self.complete(answer);
            }
        }
    }
}

/// Serves the card at `mount_point` until it is unmounted.
pub fn serve(card: Arc<Card>, mount_point: &Path) -> io::Result<()> {
    let answering = Arc::clone(&card);
    std::thread::spawn(move || answering.answer_in_time());
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("sdcard".into()), MountOption::NoAtime];
    config.acl = SessionACL::All;
    fuser::mount(Disk { card }, mount_point, &config)
}

struct Disk {
    card: Arc<Card>,
}

impl Disk {
    fn attributes(&self, inode: u64) -> FileAttr {
        let is_image = inode == IMAGE_INODE;
        let size = if is_image { self.card.state().size } else { 0 };
        FileAttr {
            ino: INodeNo(inode),
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_image { FileType::RegularFile } else { FileType::Directory },
            perm: if is_image { 0o600 } else { 0o700 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }
}

impl Filesystem for Disk {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Refusals leave the kernel's own values, which serve as well.
        let _ = config.set_max_background(64);
        let _ = config.set_congestion_threshold(64);
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if u64::from(parent) == ROOT_INODE && name == IMAGE {
            reply.entry(&FOREVER, &self.attributes(IMAGE_INODE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match u64::from(inode) {
            inode @ (ROOT_INODE | IMAGE_INODE) => reply.attr(&FOREVER, &self.attributes(inode)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.attr(&FOREVER, &self.attributes(inode.into()));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(1), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn readdir(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if u64::from(inode) != ROOT_INODE {
            reply.error(Errno::ENOTDIR);
            return;
        }
        let entries = [
            (ROOT_INODE, FileType::Directory, "."),
            (ROOT_INODE, FileType::Directory, ".."),
            (IMAGE_INODE, FileType::RegularFile, IMAGE),
        ];
        for (index, (inode, kind, name)) in entries.iter().enumerate().skip(offset as usize) {
            if reply.add(INodeNo(*inode), index as u64 + 1, *kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let now = Instant::now();
        let mut state = self.card.state();
        let length = u64::from(size).min(state.size.saturating_sub(offset)) as usize;
        let mut data = vec![0; length];
        if state.cut || self.card.image.read_exact_at(&mut data, offset).is_err() {
            drop(state);
            reply.error(Errno::EIO);
            return;
        }
        let due = state.read(offset, length as u64, now);
        let slow = state.slow;
        drop(state);
        self.card.submit(due, slow, Answer::Read(reply, data));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = self.card.state();
        let due = state.write(&self.card.image, offset, data, Instant::now());
        let slow = state.slow;
        drop(state);
        match due {
            Ok(due) => self.card.submit(due, slow, Answer::Written(reply, data.len() as u32)),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.card.state();
        if state.cut {
            drop(state);
            reply.error(Errno::EIO);
            return;
        }
        let (due, sequence) = state.flush(Instant::now());
        let slow = state.slow;
        drop(state);
        self.card.submit(due, slow, Answer::Flushed(reply, sequence));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    /// Discards of the loop device.
    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) == 0 {
            reply.error(Errno::EOPNOTSUPP);
            return;
        }
        let mut state = self.card.state();
        if state.cut || sys::punch_hole(&self.card.image, offset, length).is_err() {
            drop(state);
            reply.error(Errno::EIO);
            return;
        }
        let due = state.discard(Instant::now());
        let slow = state.slow;
        drop(state);
        self.card.submit(due, slow, Answer::Done(reply));
    }
}
