//! Reads a bbolt file that somebody else wrote, and believes nothing in it that was not checked.
//!
//! Such a file comes from an operator's backup or from a card that lost power: any field may be anything.
//!
//! # Invariants
//!
//! - Keys come out strictly ascending; a tree that would not do so is an error.
//! - A walk visits no more pages than the file has, so a page that points back to itself ends in an error.
//! - Nothing is allocated for a size that was read from the file before it was compared with the file's length.

use std::fmt;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;

use super::format::{
    BRANCH_ELEMENT_BYTES, BUCKET_HEADER_BYTES, BranchElement, LEAF_ELEMENT_BYTES, LeafElement,
    META_BYTES, Meta, PAGE_BYTES_MAX, PAGE_BYTES_MIN, PAGE_HEADER_BYTES, PageHeader, PageId,
    PageKind, u64_at,
};
use crate::env::DiskFile;

/// Deeper than any tree bbolt can build: 4 KiB branch pages hold at least two children.
const DEPTH_MAX: usize = 64;

/// Why a file cannot be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// Reading failed underneath.
    #[error("reading the bbolt file: {0}")]
    Io(#[from] io::Error),
    /// Neither meta page is whole.
    #[error("not a bbolt file: found no valid meta page in {bytes} bytes")]
    NoMeta {
        /// The file's length.
        bytes: u64,
    },
    /// The file is shorter than its meta page says.
    #[error("bbolt file is cut short: found {found} bytes, expected {expected}")]
    Short {
        /// The file's length.
        found: u64,
        /// What the meta page asks for.
        expected: u64,
    },
    /// A page is not what the page above it says.
    #[error("bbolt page {page} is damaged: {what}")]
    Damaged {
        /// The page.
        page: u64,
        /// What is wrong.
        what: &'static str,
    },
}

/// An open bbolt file.
#[derive(Clone)]
pub struct Reader {
    file: Arc<dyn DiskFile>,
    meta: Meta,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("meta", &self.meta).finish_non_exhaustive()
    }
}

impl Reader {
    /// Finds the newer valid meta page and checks that the file is as long as it says.
    pub fn open(file: Arc<dyn DiskFile>) -> Result<Self, ReadError> {
        let len = file.len()?;
        let meta = newest_meta(file.as_ref(), len)?.ok_or(ReadError::NoMeta { bytes: len })?;
        let expected = meta.pages.saturating_mul(u64::from(meta.page_bytes));
        if len < expected {
            return Err(ReadError::Short { found: len, expected });
        }
        Ok(Self { file, meta })
    }

    /// Page size of the file.
    pub const fn page_bytes(&self) -> u32 {
        self.meta.page_bytes
    }

    /// Names of the buckets at the top, sorted.
    pub fn bucket_names(&self) -> Result<Vec<Bytes>, ReadError> {
        let mut names = Vec::new();
        let mut cursor = self.cursor(Root::Page(self.meta.root));
        while let Some(entry) = cursor.next_entry()? {
            if entry.is_bucket {
                names.push(entry.key);
            }
        }
        Ok(names)
    }

    /// One bucket at the top.
    pub fn bucket(&self, name: &str) -> Result<Option<Bucket>, ReadError> {
        let mut cursor = self.cursor(Root::Page(self.meta.root));
        while let Some(entry) = cursor.next_entry()? {
            if entry.is_bucket && entry.key == name.as_bytes() {
                let damaged = damaged(self.meta.root, "bucket entry is too short");
                let root = u64_at(&entry.value, 0).ok_or(damaged)?;
                let root = if root == 0 {
                    Root::Inline(entry.value.slice(BUCKET_HEADER_BYTES.min(entry.value.len())..))
                } else {
                    Root::Page(PageId(root))
                };
                return Ok(Some(Bucket { reader: self.clone(), root }));
            }
        }
        Ok(None)
    }

    fn cursor(&self, root: Root) -> Cursor {
        Cursor {
            reader: self.clone(),
            start: Some(root),
            stack: Vec::new(),
            last: None,
            visits_left: self.meta.pages,
        }
    }

    /// Reads a page with its overflow.
    fn page(&self, id: PageId) -> Result<Page, ReadError> {
        let page_bytes = u64::from(self.meta.page_bytes);
        if id.0 < 2 || self.meta.pages <= id.0 {
            return Err(damaged(id, "no such page in the file"));
        }
        let mut header = [0; PAGE_HEADER_BYTES];
        self.file.read_at(&mut header, id.0 * page_bytes)?;
        let header =
            PageHeader::decode(&header).ok_or_else(|| damaged(id, "not a kind of page"))?;
        if header.id != id {
            return Err(damaged(id, "carries another page's number"));
        }
        let end = id.0 + 1 + u64::from(header.overflow);
        if self.meta.pages < end {
            return Err(damaged(id, "overflow runs past the end of the file"));
        }
        let bytes = usize::try_from((end - id.0) * page_bytes)
            .map_err(|_| damaged(id, "too large for this machine"))?;
        let mut buffer = vec![0; bytes];
        self.file.read_at(&mut buffer, id.0 * page_bytes)?;
        Ok(Page { id, header, bytes: buffer.into() })
    }
}

/// The valid meta page with the higher transaction number.
fn newest_meta(file: &dyn DiskFile, len: u64) -> Result<Option<Meta>, ReadError> {
    let first = meta_at(file, len, 0)?;
    let mut second = None;
    let mut page_bytes = PAGE_BYTES_MIN;
    while page_bytes <= PAGE_BYTES_MAX && second.is_none() {
        second = meta_at(file, len, page_bytes as u64)?
            .filter(|meta| meta.page_bytes as usize == page_bytes);
        page_bytes *= 2;
    }
    Ok(first.into_iter().chain(second).max_by_key(|meta| meta.txn))
}

fn meta_at(file: &dyn DiskFile, len: u64, offset: u64) -> Result<Option<Meta>, ReadError> {
    let mut bytes = [0; PAGE_HEADER_BYTES + META_BYTES];
    if len < offset + bytes.len() as u64 {
        return Ok(None);
    }
    file.read_at(&mut bytes, offset)?;
    let is_meta = PageHeader::decode(&bytes).is_some_and(|header| header.kind == PageKind::Meta);
    let meta = Meta::decode(&bytes[PAGE_HEADER_BYTES..]).filter(|meta| {
        let page_bytes = meta.page_bytes as usize;
        page_bytes.is_power_of_two() && (PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&page_bytes)
    });
    Ok(meta.filter(|_| is_meta))
}

fn damaged(page: PageId, what: &'static str) -> ReadError {
    ReadError::Damaged { page: page.0, what }
}

/// Where a tree starts.
#[derive(Clone, Debug)]
enum Root {
    Page(PageId),
    /// A small bucket's only page, inside its parent's entry.
    Inline(Bytes),
}

/// One bucket of the file.
#[derive(Clone, Debug)]
pub struct Bucket {
    reader: Reader,
    root: Root,
}

impl Bucket {
    /// Walks the bucket's keys in order.
    pub fn cursor(&self) -> Cursor {
        self.reader.cursor(self.root.clone())
    }

    /// The value of one key. Walks from the start: meant for the small buckets.
    pub fn find(&self, key: &[u8]) -> Result<Option<Bytes>, ReadError> {
        let mut cursor = self.cursor();
        while let Some((found, value)) = cursor.next()? {
            if found == key {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }
}

/// A walk over one bucket, in key order.
#[derive(Debug)]
pub struct Cursor {
    reader: Reader,
    start: Option<Root>,
    /// The pages from the root down, each with the next element to look at.
    stack: Vec<(Page, usize)>,
    last: Option<Bytes>,
    visits_left: u64,
}

struct Entry {
    is_bucket: bool,
    key: Bytes,
    value: Bytes,
}

impl Cursor {
    /// The next key and value; `None` at the end. Buckets within the bucket are left out: etcd has none.
    #[allow(clippy::should_implement_trait, reason = "fallible, and callers use while-let")]
    pub fn next(&mut self) -> Result<Option<(Bytes, Bytes)>, ReadError> {
        while let Some(entry) = self.next_entry()? {
            if !entry.is_bucket {
                return Ok(Some((entry.key, entry.value)));
            }
        }
        Ok(None)
    }

    fn next_entry(&mut self) -> Result<Option<Entry>, ReadError> {
        if let Some(root) = self.start.take() {
            let page = match root {
                Root::Page(id) => self.reader.page(id)?,
                Root::Inline(bytes) => Page::inline(bytes)?,
            };
            self.enter(page)?;
        }
        while let Some((page, next)) = self.stack.last_mut() {
            if usize::from(page.header.count) <= *next {
                self.stack.pop();
                continue;
            }
            let index = *next;
            *next += 1;
            if page.header.kind == PageKind::Branch {
                let child = page.child(index)?;
                let child = self.reader.page(child)?;
                self.enter(child)?;
            } else {
                let entry = page.entry(index)?;
                return self.in_order(entry).map(Some);
            }
        }
        Ok(None)
    }

    fn enter(&mut self, page: Page) -> Result<(), ReadError> {
        if self.visits_left == 0 || self.stack.len() == DEPTH_MAX {
            return Err(damaged(page.id, "the tree runs in a circle"));
        }
        self.visits_left -= 1;
        match page.header.kind {
            PageKind::Leaf => {}
            PageKind::Branch if 0 < page.header.count => {}
            PageKind::Branch => return Err(damaged(page.id, "a branch without children")),
            PageKind::Meta | PageKind::FreeList => {
                return Err(damaged(page.id, "not a page of a tree"));
            }
        }
        self.stack.push((page, 0));
        Ok(())
    }

    fn in_order(&mut self, entry: Entry) -> Result<Entry, ReadError> {
        if self.last.as_ref().is_some_and(|last| entry.key <= *last) {
            let page = self.stack.last().map_or(PageId(0), |(page, _)| page.id);
            return Err(damaged(page, "keys are out of order"));
        }
        self.last = Some(entry.key.clone());
        Ok(entry)
    }
}

#[derive(Debug)]
struct Page {
    id: PageId,
    header: PageHeader,
    bytes: Bytes,
}

impl Page {
    fn inline(bytes: Bytes) -> Result<Self, ReadError> {
        let id = PageId(0);
        let header =
            PageHeader::decode(&bytes).ok_or_else(|| damaged(id, "an inline page cut short"))?;
        Ok(Self { id, header, bytes })
    }

    fn child(&self, index: usize) -> Result<PageId, ReadError> {
        let at = PAGE_HEADER_BYTES + index * BRANCH_ELEMENT_BYTES;
        let element = self.bytes.get(at..).and_then(BranchElement::decode);
        element
            .map(|element| element.child)
            .ok_or_else(|| damaged(self.id, "more children than the page has room for"))
    }

    fn entry(&self, index: usize) -> Result<Entry, ReadError> {
        let at = PAGE_HEADER_BYTES + index * LEAF_ELEMENT_BYTES;
        let element = self
            .bytes
            .get(at..)
            .and_then(LeafElement::decode)
            .ok_or_else(|| damaged(self.id, "more keys than the page has room for"))?;
        let key = self.slice(at as u64 + u64::from(element.position), element.key_bytes)?;
        let value_at = at as u64 + u64::from(element.position) + u64::from(element.key_bytes);
        let value = self.slice(value_at, element.value_bytes)?;
        Ok(Entry { is_bucket: element.is_bucket, key, value })
    }

    fn slice(&self, from: u64, bytes: u32) -> Result<Bytes, ReadError> {
        let to = from + u64::from(bytes);
        let range = usize::try_from(from).ok().zip(usize::try_from(to).ok());
        match range {
            Some((from, to)) if to <= self.bytes.len() => Ok(self.bytes.slice(from..to)),
            _ => Err(damaged(self.id, "a key or value runs past the page")),
        }
    }
}
