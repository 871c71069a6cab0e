//! The bytes of a bbolt page: headers, elements, meta pages and their checksum.
//!
//! All numbers are little-endian, as bbolt writes them on every machine K3s runs on.

/// Page size we write. bbolt takes its own from the operating system, 4 KiB where etcd runs; readers take it from
/// the meta page.
pub const PAGE_BYTES: usize = 4096;

/// Smallest and largest page size a reader believes.
pub(super) const PAGE_BYTES_MIN: usize = 512;
pub(super) const PAGE_BYTES_MAX: usize = 65_536;

/// Size of a page's header: id, flags, count, overflow.
pub(super) const PAGE_HEADER_BYTES: usize = 16;
/// Size of one element header on a leaf page: flags, position, key size, value size.
pub(super) const LEAF_ELEMENT_BYTES: usize = 16;
/// Size of one element header on a branch page: position, key size, page id.
pub(super) const BRANCH_ELEMENT_BYTES: usize = 16;
/// Size of a bucket's header, which is the value of its entry: root page, sequence.
pub(super) const BUCKET_HEADER_BYTES: usize = 16;
/// Bytes of a meta page after its header.
pub(super) const META_BYTES: usize = 64;

/// Limits of bbolt.
pub(super) const KEY_BYTES_MAX: usize = 32_768;
pub(super) const VALUE_BYTES_MAX: usize = (1 << 31) - 2;

const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;

/// A page's place in the file, counted in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PageId(pub u64);

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageKind {
    Branch,
    Leaf,
    Meta,
    FreeList,
}

impl PageKind {
    const fn flags(self) -> u16 {
        match self {
            Self::Branch => 0x01,
            Self::Leaf => 0x02,
            Self::Meta => 0x04,
            Self::FreeList => 0x10,
        }
    }

    const fn from_flags(flags: u16) -> Option<Self> {
        match flags {
            0x01 => Some(Self::Branch),
            0x02 => Some(Self::Leaf),
            0x04 => Some(Self::Meta),
            0x10 => Some(Self::FreeList),
            _ => None,
        }
    }
}

/// The first bytes of every page. `overflow` counts the pages that follow and belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageHeader {
    pub id: PageId,
    pub kind: PageKind,
    pub count: u16,
    pub overflow: u32,
}

impl PageHeader {
    pub(super) fn encode(self) -> [u8; PAGE_HEADER_BYTES] {
        let mut out = [0; PAGE_HEADER_BYTES];
        out[0..8].copy_from_slice(&self.id.0.to_le_bytes());
        out[8..10].copy_from_slice(&self.kind.flags().to_le_bytes());
        out[10..12].copy_from_slice(&self.count.to_le_bytes());
        out[12..16].copy_from_slice(&self.overflow.to_le_bytes());
        out
    }

    /// `None`: too short, or a kind bbolt does not have.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            id: PageId(u64_at(bytes, 0)?),
            kind: PageKind::from_flags(u16_at(bytes, 8)?)?,
            count: u16_at(bytes, 10)?,
            overflow: u32_at(bytes, 12)?,
        })
    }
}

/// What a meta page says. `pages` is one more than the last page in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meta {
    pub page_bytes: u32,
    pub root: PageId,
    pub freelist: PageId,
    pub pages: u64,
    pub txn: u64,
}

impl Meta {
    pub(super) fn encode(self) -> [u8; META_BYTES] {
        let mut out = [0; META_BYTES];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..8].copy_from_slice(&VERSION.to_le_bytes());
        out[8..12].copy_from_slice(&self.page_bytes.to_le_bytes());
        out[16..24].copy_from_slice(&self.root.0.to_le_bytes());
        out[32..40].copy_from_slice(&self.freelist.0.to_le_bytes());
        out[40..48].copy_from_slice(&self.pages.to_le_bytes());
        out[48..56].copy_from_slice(&self.txn.to_le_bytes());
        let sum = fnv1a(&out[..56]);
        out[56..64].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// `None`: not a meta page, another version, or damaged.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let valid = u32_at(bytes, 0)? == MAGIC
            && u32_at(bytes, 4)? == VERSION
            && u64_at(bytes, 56)? == fnv1a(&bytes[..56]);
        if !valid {
            return None;
        }
        Some(Self {
            page_bytes: u32_at(bytes, 8)?,
            root: PageId(u64_at(bytes, 16)?),
            freelist: PageId(u64_at(bytes, 32)?),
            pages: u64_at(bytes, 40)?,
            txn: u64_at(bytes, 48)?,
        })
    }
}

/// One element header of a leaf page. `position` counts from the element header itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LeafElement {
    pub is_bucket: bool,
    pub position: u32,
    pub key_bytes: u32,
    pub value_bytes: u32,
}

impl LeafElement {
    pub(super) fn encode(self) -> [u8; LEAF_ELEMENT_BYTES] {
        let mut out = [0; LEAF_ELEMENT_BYTES];
        out[0..4].copy_from_slice(&u32::from(self.is_bucket).to_le_bytes());
        out[4..8].copy_from_slice(&self.position.to_le_bytes());
        out[8..12].copy_from_slice(&self.key_bytes.to_le_bytes());
        out[12..16].copy_from_slice(&self.value_bytes.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            is_bucket: u32_at(bytes, 0)? & 1 == 1,
            position: u32_at(bytes, 4)?,
            key_bytes: u32_at(bytes, 8)?,
            value_bytes: u32_at(bytes, 12)?,
        })
    }
}

/// One element header of a branch page: the subtree at `child` starts with this key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BranchElement {
    pub position: u32,
    pub key_bytes: u32,
    pub child: PageId,
}

impl BranchElement {
    pub(super) fn encode(self) -> [u8; BRANCH_ELEMENT_BYTES] {
        let mut out = [0; BRANCH_ELEMENT_BYTES];
        out[0..4].copy_from_slice(&self.position.to_le_bytes());
        out[4..8].copy_from_slice(&self.key_bytes.to_le_bytes());
        out[8..16].copy_from_slice(&self.child.0.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            position: u32_at(bytes, 0)?,
            key_bytes: u32_at(bytes, 4)?,
            child: PageId(u64_at(bytes, 8)?),
        })
    }
}

/// A bucket's entry in its parent: the root page of its tree. Root 0 means that the page follows inline.
pub(super) fn bucket_header(root: PageId) -> [u8; BUCKET_HEADER_BYTES] {
    let mut out = [0; BUCKET_HEADER_BYTES];
    out[0..8].copy_from_slice(&root.0.to_le_bytes());
    out
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// FNV-1a, 64 bits: what bbolt protects its meta pages with.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
