//! Writes a bbolt file front to back from sorted keys, with one page per tree level in memory.
//!
//! The meta pages come first and name the root, which is known last. Instead of seeking back, or spooling the
//! whole database through the card, the content is walked twice: [`Plan::measure`] lays it out without keeping it,
//! [`Plan::write`] writes it.
//!
//! # Invariants
//!
//! - Page numbers are given in the order in which pages are written, starting with 3.
//! - Both walks must produce the same keys with the same sizes; if they do not, the second ends with
//!   [`WriteError::Changed`] and not with a file that looks whole.

use std::io::{self, Write};

use thiserror::Error;

use super::format::{
    BRANCH_ELEMENT_BYTES, BUCKET_HEADER_BYTES, BranchElement, KEY_BYTES_MAX, LEAF_ELEMENT_BYTES,
    LeafElement, Meta, PAGE_BYTES, PAGE_HEADER_BYTES, PageHeader, PageId, PageKind,
    VALUE_BYTES_MAX, bucket_header,
};

/// The first page that holds content; 0 and 1 are meta pages, 2 is the empty free list.
const FIRST_PAGE: PageId = PageId(3);
const FREELIST_PAGE: PageId = PageId(2);
/// With fewer children per branch page, a level would be as wide as the one below it and the tree would never end.
const CHILDREN_MIN: usize = 2;

/// Why no file came out.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The sink failed.
    #[error("writing the backup: {0}")]
    Io(#[from] io::Error),
    /// Keys must ascend within a bucket.
    #[error("keys of bucket {bucket} are out of order: found {found:02x?} after {after:02x?}")]
    Order {
        /// The bucket.
        bucket: String,
        /// The offending key.
        found: Vec<u8>,
        /// The key before it.
        after: Vec<u8>,
    },
    /// bbolt has no room for such a key or value.
    #[error("a {what} of {bytes} bytes does not fit a bbolt file, expected 1 to {bytes_max}")]
    Size {
        /// Key, value or bucket name.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The same bucket was written twice.
    #[error("bucket {0} written twice")]
    BucketTwice(String),
    /// The second walk did not produce what the first did.
    #[error(
        "the content changed between measuring and writing: found {found} pages, expected {expected}"
    )]
    Changed {
        /// Pages of the second walk.
        found: u64,
        /// Pages of the first.
        expected: u64,
    },
    /// The content's own source failed.
    #[error("{0}")]
    Source(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Where everything will be. Made by the first walk over the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    root: PageId,
    pages: u64,
}

impl Plan {
    /// Walks the content once, to learn the layout. `fill` is called with a writer that keeps nothing.
    pub fn measure(
        fill: impl FnOnce(&mut FileWriter<'_>) -> Result<(), WriteError>,
    ) -> Result<Self, WriteError> {
        let mut sink = io::sink();
        let mut file = FileWriter::new(&mut sink);
        fill(&mut file)?;
        file.finish()
    }

    /// Size of the file in bytes.
    pub const fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES as u64
    }

    /// Walks the same content again and writes the file.
    pub fn write(
        &self,
        sink: &mut dyn Write,
        fill: impl FnOnce(&mut FileWriter<'_>) -> Result<(), WriteError>,
    ) -> Result<(), WriteError> {
        for (page, txn) in [(PageId(0), 2), (PageId(1), 1)] {
            sink.write_all(&self.meta_page(page, txn))?;
        }
        sink.write_all(&page(FREELIST_PAGE, PageKind::FreeList))?;
        let mut file = FileWriter::new(sink);
        fill(&mut file)?;
        let written = file.finish()?;
        if written == *self {
            Ok(())
        } else {
            Err(WriteError::Changed { found: written.pages, expected: self.pages })
        }
    }

    fn meta_page(&self, id: PageId, txn: u64) -> Vec<u8> {
        let meta = Meta {
            page_bytes: width(PAGE_BYTES),
            root: self.root,
            freelist: FREELIST_PAGE,
            pages: self.pages,
            txn,
        };
        let mut out = page(id, PageKind::Meta);
        out[PAGE_HEADER_BYTES..][..meta.encode().len()].copy_from_slice(&meta.encode());
        out
    }
}

/// A page with a header and nothing else.
fn page(id: PageId, kind: PageKind) -> Vec<u8> {
    let mut out = vec![0; PAGE_BYTES];
    let header = PageHeader { id, kind, count: 0, overflow: 0 };
    out[..PAGE_HEADER_BYTES].copy_from_slice(&header.encode());
    out
}

/// The file while it is being written: a set of buckets.
pub struct FileWriter<'a> {
    pages: PageSink<'a>,
    /// Finished buckets and the roots of their trees; `None` for an empty one.
    buckets: Vec<(Vec<u8>, Option<PageId>)>,
}

impl<'a> FileWriter<'a> {
    fn new(sink: &'a mut dyn Write) -> Self {
        Self { pages: PageSink { sink, next: FIRST_PAGE, buffer: Vec::new() }, buckets: Vec::new() }
    }

    /// Writes one bucket. Buckets may come in any order, the keys within one must ascend.
    pub fn bucket(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut BucketWriter<'_, 'a>) -> Result<(), WriteError>,
    ) -> Result<(), WriteError> {
        check_size("bucket name", name.len(), 1, KEY_BYTES_MAX)?;
        if self.buckets.iter().any(|(other, _)| other == name.as_bytes()) {
            return Err(WriteError::BucketTwice(name.to_owned()));
        }
        let mut bucket =
            BucketWriter { name, tree: Tree::default(), last: Vec::new(), pages: &mut self.pages };
        fill(&mut bucket)?;
        let root = bucket.tree.finish(bucket.pages)?;
        self.buckets.push((name.as_bytes().to_vec(), root));
        Ok(())
    }

    /// Writes the tree of buckets, the last pages of the file.
    fn finish(mut self) -> Result<Plan, WriteError> {
        self.buckets.sort();
        let mut tree = Tree::default();
        for (name, root) in &self.buckets {
            tree.push(&mut self.pages, true, name, &bucket_entry(*root))?;
        }
        let root = match tree.finish(&mut self.pages)? {
            Some(root) => root,
            None => self.pages.write(PageKind::Leaf, 0, |_| {})?,
        };
        Ok(Plan { root, pages: self.pages.next.0 })
    }
}

/// The value that stands for a bucket in its parent: where its root is, or an empty page in place.
fn bucket_entry(root: Option<PageId>) -> Vec<u8> {
    let mut entry = Vec::with_capacity(BUCKET_HEADER_BYTES + PAGE_HEADER_BYTES);
    entry.extend_from_slice(&bucket_header(root.unwrap_or(PageId(0))));
    if root.is_none() {
        let header = PageHeader { id: PageId(0), kind: PageKind::Leaf, count: 0, overflow: 0 };
        entry.extend_from_slice(&header.encode());
    }
    entry
}

/// One bucket while it is being written.
pub struct BucketWriter<'f, 'a> {
    name: &'f str,
    tree: Tree,
    last: Vec<u8>,
    pages: &'f mut PageSink<'a>,
}

impl BucketWriter<'_, '_> {
    /// Adds a key. Each must be greater than the one before it.
    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), WriteError> {
        check_size("key", key.len(), 1, KEY_BYTES_MAX)?;
        check_size("value", value.len(), 0, VALUE_BYTES_MAX)?;
        if key <= self.last.as_slice() {
            return Err(WriteError::Order {
                bucket: self.name.to_owned(),
                found: key.to_vec(),
                after: self.last.clone(),
            });
        }
        self.last.clear();
        self.last.extend_from_slice(key);
        self.tree.push(self.pages, false, key, value)
    }
}

fn check_size(
    what: &'static str,
    bytes: usize,
    bytes_min: usize,
    bytes_max: usize,
) -> Result<(), WriteError> {
    if (bytes_min..=bytes_max).contains(&bytes) {
        Ok(())
    } else {
        Err(WriteError::Size { what, bytes, bytes_max })
    }
}

/// A B+tree that grows at its right edge: the open leaf, and one open branch page per level above it.
#[derive(Debug, Default)]
struct Tree {
    leaf: OpenPage,
    branches: Vec<OpenPage>,
}

/// The elements of a page that is not written yet.
#[derive(Debug, Default)]
struct OpenPage {
    elements: Vec<Element>,
    /// Keys and values (leaf) or keys (branch), in element order.
    data: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Element {
    is_bucket: bool,
    key_bytes: usize,
    value_bytes: usize,
    child: PageId,
}

const _: () = assert!(LEAF_ELEMENT_BYTES == BRANCH_ELEMENT_BYTES);

impl OpenPage {
    /// Size of the page with another element of so many bytes.
    fn bytes_with(&self, more: usize) -> usize {
        PAGE_HEADER_BYTES + (self.elements.len() + 1) * LEAF_ELEMENT_BYTES + self.data.len() + more
    }

    /// Whether the page must be written before it takes such an element. Below `elements_min` it never is: an
    /// oversized page continues in overflow pages.
    fn is_full_for(&self, more: usize, elements_min: usize) -> bool {
        elements_min <= self.elements.len() && PAGE_BYTES < self.bytes_with(more)
    }

    fn first_key(&self) -> Vec<u8> {
        let end = self.elements.first().map_or(0, |element| element.key_bytes);
        self.data[..end].to_vec()
    }

    /// Writes the page and leaves it empty.
    fn write(&mut self, kind: PageKind, pages: &mut PageSink<'_>) -> Result<PageId, WriteError> {
        let (elements, data) = (&self.elements, &self.data);
        let id = pages.write(kind, elements.len(), |out| {
            let mut used = 0;
            for (index, element) in elements.iter().enumerate() {
                let position = (elements.len() - index) * LEAF_ELEMENT_BYTES + used;
                out.extend_from_slice(&element.encode(kind, position));
                used += element.key_bytes + element.value_bytes;
            }
            out.extend_from_slice(data);
        })?;
        self.elements.clear();
        self.data.clear();
        Ok(id)
    }
}

/// Sizes on a page are below 2 GiB: [`check_size`] saw them, and a page holds one large element at most.
fn width(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

impl Element {
    fn encode(self, kind: PageKind, position: usize) -> [u8; LEAF_ELEMENT_BYTES] {
        if kind == PageKind::Branch {
            BranchElement {
                position: width(position),
                key_bytes: width(self.key_bytes),
                child: self.child,
            }
            .encode()
        } else {
            LeafElement {
                is_bucket: self.is_bucket,
                position: width(position),
                key_bytes: width(self.key_bytes),
                value_bytes: width(self.value_bytes),
            }
            .encode()
        }
    }
}

impl Tree {
    fn push(
        &mut self,
        pages: &mut PageSink<'_>,
        is_bucket: bool,
        key: &[u8],
        value: &[u8],
    ) -> Result<(), WriteError> {
        if self.leaf.is_full_for(key.len() + value.len(), 1) {
            self.close_leaf(pages)?;
        }
        self.leaf.elements.push(Element {
            is_bucket,
            key_bytes: key.len(),
            value_bytes: value.len(),
            child: PageId(0),
        });
        self.leaf.data.extend_from_slice(key);
        self.leaf.data.extend_from_slice(value);
        Ok(())
    }

    fn close_leaf(&mut self, pages: &mut PageSink<'_>) -> Result<(), WriteError> {
        let key = self.leaf.first_key();
        let id = self.leaf.write(PageKind::Leaf, pages)?;
        self.add_child(pages, 0, &key, id)
    }

    /// Adds a finished page to the branch page above it, which is written first if it is full.
    fn add_child(
        &mut self,
        pages: &mut PageSink<'_>,
        level: usize,
        key: &[u8],
        child: PageId,
    ) -> Result<(), WriteError> {
        if level == self.branches.len() {
            self.branches.push(OpenPage::default());
        }
        if self.branches[level].is_full_for(key.len(), CHILDREN_MIN) {
            self.close_branch(pages, level)?;
        }
        let branch = &mut self.branches[level];
        branch.elements.push(Element {
            is_bucket: false,
            key_bytes: key.len(),
            value_bytes: 0,
            child,
        });
        branch.data.extend_from_slice(key);
        Ok(())
    }

    fn close_branch(&mut self, pages: &mut PageSink<'_>, level: usize) -> Result<(), WriteError> {
        let key = self.branches[level].first_key();
        let id = self.branches[level].write(PageKind::Branch, pages)?;
        self.add_child(pages, level + 1, &key, id)
    }

    /// Writes what is open and returns the root; `None` if nothing was ever added.
    fn finish(&mut self, pages: &mut PageSink<'_>) -> Result<Option<PageId>, WriteError> {
        if self.leaf.elements.is_empty() {
            return Ok(None);
        }
        if self.branches.is_empty() {
            return self.leaf.write(PageKind::Leaf, pages).map(Some);
        }
        self.close_leaf(pages)?;
        let mut level = 0;
        while level + 1 < self.branches.len() {
            self.close_branch(pages, level)?;
            level += 1;
        }
        self.branches[level].write(PageKind::Branch, pages).map(Some)
    }
}

/// Numbers pages and hands them to the sink.
struct PageSink<'a> {
    sink: &'a mut dyn Write,
    next: PageId,
    /// Reused from page to page.
    buffer: Vec<u8>,
}

impl PageSink<'_> {
    /// Writes one page of any length, padded to whole pages.
    fn write(
        &mut self,
        kind: PageKind,
        count: usize,
        body: impl FnOnce(&mut Vec<u8>),
    ) -> Result<PageId, WriteError> {
        let id = self.next;
        self.buffer.clear();
        self.buffer.resize(PAGE_HEADER_BYTES, 0);
        body(&mut self.buffer);
        let used = self.buffer.len().div_ceil(PAGE_BYTES);
        self.buffer.resize(used * PAGE_BYTES, 0);
        // A page holds as many elements as fit 4 KiB, so the count is far below 2^16.
        let header = PageHeader {
            id,
            kind,
            count: u16::try_from(count).unwrap_or(u16::MAX),
            overflow: width(used - 1),
        };
        self.buffer[..PAGE_HEADER_BYTES].copy_from_slice(&header.encode());
        self.sink.write_all(&self.buffer)?;
        self.next = PageId(id.0 + used as u64);
        // One huge value must not pin its size for the rest of the file.
        self.buffer.shrink_to(16 * PAGE_BYTES);
        Ok(id)
    }
}
