//! Makes new inputs from old ones: bits, lengths, pieces, words of the format, and whole protobuf fields.

use super::random::Random;

/// Larger inputs only make the loop slower.
const INPUT_BYTES_MAX: usize = 64 << 10;
/// Numbers at the edges of what formats store.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 32,
    u64::MAX >> 1,
    u64::MAX,
];

/// Makes inputs, one after the other, from a corpus.
pub struct Mutator<'a> {
    random: Random,
    corpus: &'a [Vec<u8>],
    dictionary: &'a [&'a [u8]],
}

impl<'a> Mutator<'a> {
    pub const fn new(random: Random, corpus: &'a [Vec<u8>], dictionary: &'a [&'a [u8]]) -> Self {
        Self { random, corpus, dictionary }
    }

    /// The next input: one of the corpus with a few changes.
    pub fn input(&mut self) -> Vec<u8> {
        let mut input = self.random.pick(self.corpus).clone();
        // Mostly one change, so that the rest stays valid and the change is reached.
        let mut changes = 1;
        while self.random.one_in(2) && changes < 8 {
            changes += 1;
        }
        for _ in 0..changes {
            self.change(&mut input);
        }
        input.truncate(INPUT_BYTES_MAX);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>) {
        match self.random.below(12) {
            0 | 1 => self.flip_bit(input),
            2 => self.set_byte(input),
            3 | 4 => self.set_number(input),
            5 => self.remove_piece(input),
            6 => self.repeat_piece(input),
            7 => self.insert_word(input),
            8 => self.cut(input),
            9 => self.cross(input),
            _ => self.change_field(input),
        }
    }

    fn position(&mut self, input: &[u8]) -> usize {
        self.random.below(input.len() + 1)
    }

    fn piece(&mut self, input: &[u8]) -> std::ops::Range<usize> {
        let from = self.position(input);
        let left = input.len() - from;
        // Short pieces are more telling than long ones.
        let longest = if self.random.one_in(4) { left } else { left.min(16) };
        from..from + self.random.below(longest + 1)
    }

    fn flip_bit(&mut self, input: &mut [u8]) {
        if !input.is_empty() {
            let at = self.random.below(input.len());
            input[at] ^= 1 << self.random.below(8);
        }
    }

    fn set_byte(&mut self, input: &mut [u8]) {
        if !input.is_empty() {
            let at = self.random.below(input.len());
            input[at] = *self.random.pick(&[0x00, 0x01, 0x0a, 0x20, 0x7f, 0x80, 0xfe, 0xff]);
        }
    }

    /// Overwrites 1, 2, 4 or 8 bytes by a number from the edges, or moves the number there by a little.
    fn set_number(&mut self, input: &mut [u8]) {
        let width = *self.random.pick(&[1_usize, 2, 4, 8]);
        if input.len() < width {
            return;
        }
        let at = self.random.below(input.len() - width + 1);
        let place = &mut input[at..at + width];
        let mut number = [0; 8];
        number[..width].copy_from_slice(place);
        let found = u64::from_le_bytes(number);
        let changed = match self.random.below(3) {
            0 => *self.random.pick(&EDGES),
            1 => found.wrapping_add(1 + self.random.next_u64() % 16),
            _ => found.wrapping_sub(1 + self.random.next_u64() % 16),
        };
        let bytes = changed.to_le_bytes();
        if self.random.one_in(3) {
            place.iter_mut().zip(bytes[..width].iter().rev()).for_each(|(to, from)| *to = *from);
        } else {
            place.copy_from_slice(&bytes[..width]);
        }
    }

    fn remove_piece(&mut self, input: &mut Vec<u8>) {
        let piece = self.piece(input);
        input.drain(piece);
    }

    fn repeat_piece(&mut self, input: &mut Vec<u8>) {
        let range = self.piece(input);
        let piece = input[range].to_vec();
        let at = self.position(input);
        for _ in 0..1 + self.random.below(4) {
            input.splice(at..at, piece.iter().copied());
        }
    }

    fn insert_word(&mut self, input: &mut Vec<u8>) {
        let at = self.position(input);
        if self.dictionary.is_empty() {
            let byte = self.random.next_u64().to_le_bytes()[0];
            input.insert(at, byte);
        } else {
            let word = *self.random.pick(self.dictionary);
            // Over what is there, or between.
            let end = if self.random.one_in(2) { at } else { (at + word.len()).min(input.len()) };
            input.splice(at..end, word.iter().copied());
        }
    }

    fn cut(&mut self, input: &mut Vec<u8>) {
        let at = self.position(input);
        input.truncate(at);
    }

    /// The beginning of this, the end of another.
    fn cross(&mut self, input: &mut Vec<u8>) {
        let other = self.random.pick(self.corpus).clone();
        let (from, at) = (self.position(&other), self.position(input));
        input.truncate(at);
        input.extend_from_slice(&other[from..]);
    }

    /// Takes what follows a short header as a protobuf message, and changes one of its fields.
    fn change_field(&mut self, input: &mut Vec<u8>) {
        let header = self.random.below(5).min(input.len());
        if let Some(changed) = self.change_message(&input[header..], 0) {
            input.truncate(header);
            input.extend_from_slice(&changed);
        } else {
            self.flip_bit(input);
        }
    }

    fn change_message(&mut self, message: &[u8], depth: usize) -> Option<Vec<u8>> {
        let mut fields = fields(message).filter(|fields| !fields.is_empty())?;
        let at = self.random.below(fields.len());
        match self.random.below(6) {
            0 => drop(fields.remove(at)),
            1 => fields.push(fields[at].clone()),
            2 => {
                let other = self.random.below(fields.len());
                fields.swap(at, other);
            }
            // Another field's number, with this one's content.
            3 => fields[at].number = 1 + self.random.next_u64() % 13,
            _ => self.change_content(&mut fields[at], depth),
        }
        Some(fields.iter().flat_map(Field::encode).collect())
    }

    fn change_content(&mut self, field: &mut Field, depth: usize) {
        match &mut field.content {
            Content::Number(number) => {
                *number = match self.random.below(3) {
                    0 => *self.random.pick(&EDGES),
                    1 => number.wrapping_add(1),
                    _ => number.wrapping_neg(),
                };
            }
            Content::Bytes(bytes) => {
                let inner = if depth < 8 && self.random.one_in(2) {
                    self.change_message(bytes, depth + 1)
                } else {
                    None
                };
                match inner {
                    Some(inner) => *bytes = inner,
                    None if self.random.one_in(4) => bytes.clear(),
                    // A message inside itself, for readers that recurse.
                    None if self.random.one_in(8) => {
                        let own =
                            Field { number: field.number, content: Content::Bytes(bytes.clone()) };
                        *bytes = own.encode();
                    }
                    None => self.flip_bit(bytes),
                }
            }
        }
    }
}

/// One field of a protobuf message. Only the two kinds that etcd's messages use.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Field {
    number: u64,
    content: Content,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Number(u64),
    Bytes(Vec<u8>),
}

impl Field {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match &self.content {
            Content::Number(number) => {
                put_varint(&mut out, self.number << 3);
                put_varint(&mut out, *number);
            }
            Content::Bytes(bytes) => {
                put_varint(&mut out, self.number << 3 | 2);
                put_varint(&mut out, bytes.len() as u64);
                out.extend_from_slice(bytes);
            }
        }
        out
    }
}

/// The fields of a message; `None` if it is not one.
fn fields(mut message: &[u8]) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let tag = take_varint(&mut message)?;
        let content = match tag & 7 {
            0 => Content::Number(take_varint(&mut message)?),
            2 => {
                let length = usize::try_from(take_varint(&mut message)?).ok()?;
                let (bytes, rest) = message.split_at_checked(length)?;
                message = rest;
                Content::Bytes(bytes.to_vec())
            }
            _ => return None,
        };
        fields.push(Field { number: tag >> 3, content });
    }
    Some(fields)
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while 0x80 <= number {
        out.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    out.push(number.to_le_bytes()[0]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_being_taken_apart() {
        let message = [
            Field { number: 1, content: Content::Bytes(b"key".to_vec()) },
            Field { number: 3, content: Content::Number(u64::MAX) },
            Field { number: 64, content: Content::Bytes(Vec::new()) },
        ];
        let bytes: Vec<u8> = message.iter().flat_map(Field::encode).collect();
        assert_eq!(fields(&bytes), Some(message.to_vec()));
        assert_eq!(fields(b"\x0a\x7fshort"), None);
    }

    #[test]
    fn every_kind_of_change_leaves_something_that_can_be_changed_again() {
        let corpus = vec![Vec::new(), b"a".to_vec(), vec![0x0a, 1, b'k', 0x18, 5]];
        let dictionary: [&[u8]; 2] = [b"", b"word"];
        let mut mutator = Mutator::new(Random::new(1), &corpus, &dictionary);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..20_000 {
            let input = mutator.input();
            assert!(input.len() <= INPUT_BYTES_MAX);
            seen.insert(input);
        }
        assert!(2_000 < seen.len(), "only {} different inputs", seen.len());
    }
}
