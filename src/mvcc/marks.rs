//! Remembers which of the last entries of the log made a revision, so that the log can be shown with revisions.
//!
//! An entry holds a request; whether it changed anything only applying it tells, and the state it was applied to is gone.
//! A command makes one revision or none: one bit. Sixty-four entries share a row, and the rows go round, so this is two
//! hundred KiB for a quarter of a million entries, more than a log keeps in any but the worst case.
//!
//! # Invariants
//!
//! - A pure function of the entries that were applied, however they were batched: equal on every member.
//! - A row that has been written over is not taken for the one that is asked for: it says which it is.
//!
//! # Not here
//!
//! Anything that serving clients needs: only `wal dump` reads this.

use redb::{ReadableTable, Table as RedbTable};

use crate::types::{LogIndex, Revision};

use super::StoreError;
use super::format::{self, Table};
use super::view::Slice;

/// Entries that share a row.
const ROW_ENTRIES: u64 = 64;

/// Rows that are kept.
const ROWS: u64 = 4096;

/// What is known of the entries `64 * number` to `64 * number + 63`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    number: u64,
    /// The revision before the first of them that is known.
    base: i64,
    /// Entries that were applied, the first in the lowest bit.
    known: u64,
    /// Entries that made a revision.
    made: u64,
}

impl Row {
    const BYTES: usize = 32;

    fn of(index: LogIndex) -> (u64, u64) {
        (index.get() / ROW_ENTRIES, 1 << (index.get() % ROW_ENTRIES))
    }

    /// Where it is kept.
    fn key(number: u64) -> Vec<u8> {
        [b"mark".as_slice(), &(number % ROWS).to_be_bytes()].concat()
    }

    fn encode(&self) -> Vec<u8> {
        let numbers = [self.number, self.base.cast_unsigned(), self.known, self.made];
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let (numbers, _) = bytes.as_chunks::<8>();
        let [number, base, known, made] = numbers else { return None };
        Some(Self {
            number: u64::from_le_bytes(*number),
            base: i64::from_le_bytes(*base),
            known: u64::from_le_bytes(*known),
            made: u64::from_le_bytes(*made),
        })
    }

    /// The revision after one of its entries.
    fn revision_after(&self, bit: u64) -> Option<i64> {
        let upto = self.made & (bit | (bit - 1));
        (self.known & bit != 0).then(|| self.base.saturating_add(i64::from(upto.count_ones())))
    }

    /// Adds what came later.
    const fn extend(self, later: &Self) -> Self {
        Self { known: self.known | later.known, made: self.made | later.made, ..self }
    }
}

/// Rows that a batch of entries adds to.
#[derive(Debug)]
pub(super) struct Marks {
    /// The revision before the next entry.
    revision: i64,
    rows: Vec<Row>,
}

impl Marks {
    pub(super) const fn new(revision: i64) -> Self {
        Self { revision, rows: Vec::new() }
    }

    /// An entry was applied, and this is the revision after it.
    pub(super) fn note(&mut self, index: LogIndex, revision: i64) {
        let before = std::mem::replace(&mut self.revision, revision);
        let (number, bit) = Row::of(index);
        if self.rows.last().is_none_or(|row| row.number != number) {
            self.rows.push(Row { number, base: before, known: 0, made: 0 });
        }
        if let Some(row) = self.rows.last_mut() {
            row.known |= bit;
            if before < revision {
                row.made |= bit;
            }
        }
    }

    /// Writes the rows down.
    pub(super) fn store(self, meta: &mut RedbTable<'_, Slice, Slice>) -> Result<(), StoreError> {
        for row in self.rows {
            let key = Row::key(row.number);
            let stored = read(meta, &key)?.filter(|stored| stored.number == row.number);
            let row = stored.map_or(row, |stored| stored.extend(&row));
            let record = format::encode_plain(Table::Meta, &key, &row.encode());
            meta.insert(key.as_slice(), record.as_slice())?;
        }
        Ok(())
    }
}

/// The revision after an entry, if that is remembered.
pub(super) fn revision_after(
    meta: &impl ReadableTable<Slice, Slice>,
    index: LogIndex,
) -> Result<Option<Revision>, StoreError> {
    let (number, bit) = Row::of(index);
    let row = read(meta, &Row::key(number))?.filter(|row| row.number == number);
    Ok(row.and_then(|row| row.revision_after(bit)).map(Revision::new))
}

fn read(meta: &impl ReadableTable<Slice, Slice>, key: &[u8]) -> Result<Option<Row>, StoreError> {
    let Some(bytes) = meta.get(key)? else { return Ok(None) };
    let payload = format::decode_plain(Table::Meta, key, bytes.value())?;
    let row = Row::decode(payload);
    row.map(Some).ok_or_else(|| StoreError::damaged(Table::Meta.name(), "a row of marks is cut"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(rows: &[Row], index: u64) -> Option<i64> {
        let (number, bit) = Row::of(LogIndex::new(index));
        rows.iter().find(|row| row.number == number)?.revision_after(bit)
    }

    #[test]
    fn every_entry_has_the_revision_after_it() {
        let mut marks = Marks::new(5);
        // Every third entry makes a revision.
        let revision = |index: u64| 5 + i64::try_from(index / 3 - 33).unwrap();
        (100..300).for_each(|index| marks.note(LogIndex::new(index), revision(index)));
        assert_eq!(marks.rows.len(), 4);
        for index in 100..300 {
            assert_eq!(after(&marks.rows, index), Some(revision(index)), "{index}");
        }
        assert_eq!((after(&marks.rows, 99), after(&marks.rows, 300)), (None, None));
        for row in marks.rows {
            assert_eq!(Row::decode(&row.encode()), Some(row));
        }
    }

    #[test]
    fn batches_do_not_show() {
        let revision = |index: u64| i64::try_from(index / 10 - 5).unwrap();
        let note = |marks: &mut Marks, indexes: std::ops::Range<u64>| {
            indexes.for_each(|index| marks.note(LogIndex::new(index), revision(index)));
        };
        let mut whole = Marks::new(1);
        note(&mut whole, 64..128);
        let mut first = Marks::new(1);
        note(&mut first, 64..90);
        let mut second = Marks::new(first.revision);
        note(&mut second, 90..128);
        assert_eq!(first.rows[0].extend(&second.rows[0]), whole.rows[0]);
    }

    #[test]
    fn cut_rows_are_none() {
        assert_eq!(Row::decode(&[0; 31]), None);
        assert_eq!(Row::decode(&[0; 33]), None);
    }
}
