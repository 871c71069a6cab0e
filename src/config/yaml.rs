//! Reads one configuration file: bytes in, keys and values with their places out. Never panics.
//!
//! The only file that names `serde_yaml`. Its values do not carry places, but the text of a scalar is a
//! borrowed slice of the input, and where a slice lies inside the input *is* its place. The document is walked
//! twice: once to learn its form, once to borrow each scalar's text as it was written.
//!
//! # Invariants
//!
//! - Size, depth and the number of nodes (aliases followed) are bounded before anything is built from them.
//! - Scalars keep the text that was typed: `0644` is `0644` here. What it means is for the key to say.
//! - Keys come out in the order of the file, repeated ones too.

use std::fmt;
use std::sync::Arc;

use serde::de::{
    self, Deserialize, DeserializeSeed, EnumAccess, IgnoredAny, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};

use super::origin::{Origin, Position};
use super::problem::{Problem, Problems};

/// Largest file that is read. K3s configurations are a few KiB.
pub const FILE_BYTES_MAX: usize = 256 * 1024;

/// Most nodes of a document, aliases followed.
const NODES_MAX: usize = 20_000;

/// Deepest flow nesting given to the parser, whose work grows with depth times length.
const FLOW_DEPTH_MAX: usize = 256;

/// A scalar as it was typed.
#[derive(Clone, PartialEq, Eq)]
pub struct Scalar {
    /// Its text, without quotes.
    pub text: String,
    /// Whether it stood in quotes or in a block.
    pub quoted: bool,
    /// Where it begins.
    pub position: Position,
}

impl fmt::Debug for Scalar {
    /// Without the text, which may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scalar({})", self.position)
    }
}

/// What a key was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// One scalar; an empty one for "nothing".
    One(Scalar),
    /// A list of scalars.
    List(Vec<Scalar>),
    /// Something no key takes, named for the message.
    Unusable(&'static str),
}

/// One `key: value` of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key without a `+` at its end.
    pub name: String,
    /// Whether there was one.
    pub append: bool,
    /// Where the key begins.
    pub position: Position,
    /// What it was given.
    pub value: Value,
}

/// Reads the text of a file. The name is used in messages only.
pub fn parse(name: &str, bytes: &[u8]) -> Result<Vec<Entry>, Problems> {
    let file: Arc<str> = Arc::from(name);
    let document = Document::new(&file, bytes)?;
    document.entries()
}

struct Document<'a> {
    file: &'a Arc<str>,
    text: &'a str,
    /// Where each line begins, so that finding the place of a scalar does not walk the whole text.
    line_starts: Vec<usize>,
}

impl<'a> Document<'a> {
    /// Checks everything that must hold before the parser sees the text.
    fn new(file: &'a Arc<str>, bytes: &'a [u8]) -> Result<Self, Problems> {
        let at = |line, column| Origin::File(Position { file: Arc::clone(file), line, column });
        if FILE_BYTES_MAX < bytes.len() {
            return Err(Problem::error(at(1, 1), "the file is too large")
                .found(format!("{} bytes", bytes.len()))
                .expected(format!("at most {FILE_BYTES_MAX}"))
                .into());
        }
        if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
            return Err(Problem::error(at(1, 1), "the file is not UTF-8")
                .found("UTF-16")
                .expected("UTF-8")
                .fix("save the file as UTF-8")
                .into());
        }
        let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let good = std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default();
            let (line, column) = line_and_column(good, good.len());
            Problem::error(at(line, column), "the file is not UTF-8")
                .found(format!(
                    "byte 0x{:02x}",
                    bytes.get(error.valid_up_to()).copied().unwrap_or(0)
                ))
                .expected("UTF-8")
                .fix("save the file as UTF-8")
        })?;
        let line_starts =
            std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        let document = Self { file, text, line_starts };
        if let Some(offset) = too_deep(text) {
            return Err(Problem::error(document.origin(offset), "brackets are nested too deeply")
                .expected("a mapping of keys to values or lists")
                .into());
        }
        Ok(document)
    }

    fn entries(&self) -> Result<Vec<Entry>, Problems> {
        let form = self.read(FormSeed { nodes: &mut 0 })?;
        let pairs = match form {
            Form::Scalar(ScalarForm::Null) => return Ok(Vec::new()),
            Form::Map(pairs) => pairs,
            Form::Scalar(_) | Form::List(_) | Form::Tagged => {
                return Err(Problem::error(
                    self.origin(self.first_content()),
                    "the file is not a mapping",
                )
                .found(form.name())
                .expected("lines of `key: value`")
                .into());
            }
        };
        let texts = self.read(TextsSeed { document: self, pairs: &pairs })?;
        Ok(texts)
    }

    fn read<'t, S: DeserializeSeed<'t>>(&'t self, seed: S) -> Result<S::Value, Problems> {
        seed.deserialize(serde_yaml::Deserializer::from_str(self.text))
            .map_err(|error| self.problem(&error).into())
    }

    /// The parser's complaint in our form. Its place, which it prints at the end, goes to the front.
    fn problem(&self, error: &serde_yaml::Error) -> Problem {
        let message = error.to_string();
        let (line, column) =
            error.location().map_or((1, 1), |place| (place.line(), place.column()));
        let place = format!(" at line {line} column {column}");
        let reason = message.replace(&place, "");
        let position = Position { file: Arc::clone(self.file), line, column };
        let problem =
            Problem::error(Origin::File(position), format!("not readable as YAML: {reason}"));
        let begins_with_tab = self
            .text
            .lines()
            .nth(line.saturating_sub(1))
            .is_some_and(|line| line.trim_start_matches(' ').starts_with('\t'));
        if begins_with_tab { problem.fix("indent with spaces, not with tabs") } else { problem }
    }

    /// Byte offset of the first thing that is neither a comment nor blank.
    fn first_content(&self) -> usize {
        let mut offset = 0;
        for line in self.text.split_inclusive('\n') {
            let trimmed = line.trim();
            if !(trimmed.is_empty() || trimmed.starts_with('#') || trimmed == "---") {
                return offset + (line.len() - line.trim_start().len());
            }
            offset += line.len();
        }
        0
    }

    fn origin(&self, offset: usize) -> Origin {
        Origin::File(self.position(offset))
    }

    fn position(&self, offset: usize) -> Position {
        let line = self.line_starts.partition_point(|start| *start <= offset).max(1);
        let before = self.text.get(self.line_starts[line - 1]..offset).unwrap_or_default();
        Position { file: Arc::clone(self.file), line, column: before.chars().count() + 1 }
    }

    /// Where a borrowed text lies in the input.
    fn offset_of(&self, part: &str) -> Option<usize> {
        let offset = (part.as_ptr() as usize).checked_sub(self.text.as_ptr() as usize)?;
        (offset + part.len() <= self.text.len()).then_some(offset)
    }

    /// A scalar from its text; one the parser had to rewrite (escapes, blocks) takes the place of its key.
    fn scalar(&self, text: &Text<'_>, otherwise: &Position) -> Scalar {
        let offset = match text {
            Text::Borrowed(part) => self.offset_of(part),
            Text::Owned(_) => None,
        };
        let Some(offset) = offset else {
            return Scalar {
                text: text.get().to_owned(),
                quoted: true,
                position: otherwise.clone(),
            };
        };
        let quote =
            offset.checked_sub(1).filter(|at| matches!(self.text.as_bytes()[*at], b'"' | b'\''));
        Scalar {
            text: text.get().to_owned(),
            quoted: quote.is_some(),
            position: self.position(quote.unwrap_or(offset)),
        }
    }
}

/// Line and column of a byte offset, from 1, columns in characters.
fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    let line = before.bytes().filter(|b| *b == b'\n').count() + 1;
    (line, before[line_start..].chars().count() + 1)
}

/// Where brackets, quoted ones included, open more often than they close by more than the bound.
fn too_deep(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    for (offset, byte) in text.bytes().enumerate() {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if FLOW_DEPTH_MAX < depth {
            return Some(offset);
        }
    }
    None
}

/// What a node is, learnt in the first walk.
enum Form {
    Scalar(ScalarForm),
    List(Vec<Form>),
    Map(Vec<(Form, Form)>),
    Tagged,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ScalarForm {
    Null,
    Text,
}

impl Form {
    const fn name(&self) -> &'static str {
        match self {
            Self::Scalar(_) => "a single value",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
            Self::Tagged => "a tagged value",
        }
    }
}

/// First walk.
struct FormSeed<'n> {
    nodes: &'n mut usize,
}

impl<'de> DeserializeSeed<'de> for FormSeed<'_> {
    type Value = Form;

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Form, D::Error> {
        *self.nodes += 1;
        if NODES_MAX < *self.nodes {
            return Err(de::Error::custom(format!(
                "more than {NODES_MAX} values, aliases followed"
            )));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for FormSeed<'_> {
    type Value = Form;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("keys with values or lists")
    }

    fn visit_unit<E>(self) -> Result<Form, E> {
        Ok(Form::Scalar(ScalarForm::Null))
    }

    fn visit_none<E>(self) -> Result<Form, E> {
        Ok(Form::Scalar(ScalarForm::Null))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Form, E> {
        Ok(Form::Scalar(ScalarForm::Text))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Form, E> {
        Ok(Form::Scalar(ScalarForm::Text))
    }

    fn visit_i128<E>(self, _: i128) -> Result<Form, E> {
        Ok(Form::Scalar(ScalarForm::Text))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Form, E> {
        Ok(Form::Scalar(ScalarForm::Text))
    }

    fn visit_u128<E>(self, _: u128) -> Result<Form, E> {
        Ok(Form::Scalar(ScalarForm::Text))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Form, E> {
        Ok(Form::Scalar(ScalarForm::Text))
    }

    fn visit_str<E>(self, _: &str) -> Result<Form, E> {
        Ok(Form::Scalar(ScalarForm::Text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Form, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(FormSeed { nodes: self.nodes })? {
            items.push(item);
        }
        Ok(Form::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Form, A::Error> {
        let mut pairs = Vec::new();
        while let Some(key) = access.next_key_seed(FormSeed { nodes: self.nodes })? {
            let value = access.next_value_seed(FormSeed { nodes: self.nodes })?;
            pairs.push((key, value));
        }
        Ok(Form::Map(pairs))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, access: A) -> Result<Form, A::Error> {
        let (IgnoredAny, content) = access.variant()?;
        content.newtype_variant::<IgnoredAny>()?;
        Ok(Form::Tagged)
    }
}

/// The text of a scalar, borrowed from the input where the parser did not have to rewrite it.
enum Text<'de> {
    Borrowed(&'de str),
    Owned(String),
}

impl Text<'_> {
    fn get(&self) -> &str {
        match self {
            Self::Borrowed(text) => text,
            Self::Owned(text) => text,
        }
    }
}

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;

        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text::Borrowed(text))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text::Owned(text.to_owned()))
            }
        }

        deserializer.deserialize_str(TextVisitor)
    }
}

/// Second walk over a mapping whose form is known.
struct TextsSeed<'a> {
    document: &'a Document<'a>,
    pairs: &'a [(Form, Form)],
}

impl<'de> DeserializeSeed<'de> for TextsSeed<'_> {
    type Value = Vec<Entry>;

    fn deserialize<D: de::Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> Result<Vec<Entry>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TextsSeed<'_> {
    type Value = Vec<Entry>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("keys with values")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Vec<Entry>, A::Error> {
        let start = self.document.position(0);
        let mut entries = Vec::with_capacity(self.pairs.len());
        for (key, value) in self.pairs {
            if !matches!(key, Form::Scalar(_)) {
                return Err(de::Error::custom("a key is not a single word"));
            }
            let Some(name) = access.next_key::<Text<'de>>()? else {
                break;
            };
            let name = self.document.scalar(&name, &start);
            let value = access.next_value_seed(ValueSeed {
                document: self.document,
                form: value,
                key: &name.position,
            })?;
            let (bare, append) = match name.text.strip_suffix('+') {
                Some(bare) => (bare.to_owned(), true),
                None => (name.text, false),
            };
            entries.push(Entry { name: bare, append, position: name.position, value });
        }
        while access.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(entries)
    }
}

/// Second walk over the value of one key.
struct ValueSeed<'a> {
    document: &'a Document<'a>,
    form: &'a Form,
    key: &'a Position,
}

impl<'de> DeserializeSeed<'de> for ValueSeed<'_> {
    type Value = Value;

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        match self.form {
            Form::Scalar(_) => {
                let text = Text::deserialize(deserializer)?;
                Ok(Value::One(self.document.scalar(&text, self.key)))
            }
            Form::List(items) if items.iter().all(|item| matches!(item, Form::Scalar(_))) => {
                let texts = Vec::<Text<'de>>::deserialize(deserializer)?;
                Ok(Value::List(
                    texts.iter().map(|text| self.document.scalar(text, self.key)).collect(),
                ))
            }
            Form::List(_) => {
                IgnoredAny::deserialize(deserializer)?;
                Ok(Value::Unusable("a list inside a list, or a mapping"))
            }
            Form::Map(_) | Form::Tagged => {
                IgnoredAny::deserialize(deserializer)?;
                Ok(Value::Unusable(self.form.name()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_ok(text: &str) -> Vec<Entry> {
        parse("f", text.as_bytes()).unwrap()
    }

    fn place(position: &Position) -> (usize, usize) {
        (position.line, position.column)
    }

    fn one(entry: &Entry) -> (&str, bool, (usize, usize)) {
        let Value::One(scalar) = &entry.value else { panic!("{entry:?}") };
        (&scalar.text, scalar.quoted, place(&scalar.position))
    }

    #[test]
    fn every_key_and_value_knows_its_place() {
        let entries = parse_ok(
            "# c\na: 0644\n\"b\":   'x y'\n  \n\u{e9}: [p, \"q\"]\nl+:\n- 1e10\n-   two # z\n",
        );

        assert_eq!(place(&entries[0].position), (2, 1));
        assert_eq!(one(&entries[0]), ("0644", false, (2, 4)));
        assert_eq!(place(&entries[1].position), (3, 1));
        assert_eq!(one(&entries[1]), ("x y", true, (3, 8)));
        let Value::List(items) = &entries[2].value else { panic!() };
        assert_eq!(place(&items[0].position), (5, 5));
        assert_eq!((place(&items[1].position), items[1].quoted), ((5, 8), true));
        assert_eq!((entries[3].name.as_str(), entries[3].append), ("l", true));
        let Value::List(items) = &entries[3].value else { panic!() };
        assert_eq!((items[0].text.as_str(), place(&items[0].position)), ("1e10", (7, 3)));
        assert_eq!((items[1].text.as_str(), place(&items[1].position)), ("two", (8, 5)));
    }

    #[test]
    fn rewritten_scalars_take_the_place_of_their_key() {
        let entries = parse_ok("a: 1\nb: |\n  x\n  y\nc: \"p\\tq\"\n");

        assert_eq!(one(&entries[1]), ("x\ny\n", true, (2, 1)));
        assert_eq!(one(&entries[2]), ("p\tq", true, (5, 1)));
    }

    #[test]
    fn byte_order_mark_and_windows_line_ends_change_nothing() {
        let unix = parse("f", b"a: 1\nb:\n  - x\n").unwrap();
        let windows = parse("f", b"\xef\xbb\xbfa: 1\r\nb:\r\n  - x\r\n").unwrap();

        assert_eq!(unix, windows);
    }

    #[test]
    fn empty_files_hold_nothing() {
        for text in ["", "\n", "# only\n", "---\n", "---\n# x\n", "null\n", "~"] {
            assert_eq!(parse_ok(text), [], "{text:?}");
        }
    }

    #[test]
    fn repeated_keys_all_come_out_in_order() {
        let entries = parse_ok("a: 1\nb: 2\na: 3\n");

        assert_eq!(entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["a", "b", "a"]);
    }

    #[test]
    fn nothing_is_an_empty_scalar() {
        let entries = parse_ok("a:\nb: ~\nc: ''\n");

        assert_eq!((one(&entries[0]).0, one(&entries[0]).1), ("", false));
        assert_eq!((one(&entries[1]).0, one(&entries[1]).1), ("~", false));
        assert_eq!((one(&entries[2]).0, one(&entries[2]).1), ("", true));
    }

    #[test]
    fn broken_files_are_refused_with_line_and_column() {
        let text = |bytes: &[u8]| parse("f", bytes).unwrap_err().to_string();

        assert!(
            text(b"a: 1\n\tb: 2\n").contains("fix: indent with spaces"),
            "{}",
            text(b"a: 1\n\tb: 2\n")
        );
        assert!(text(b"a: 1\n b: 2\n").starts_with("f:2:"), "{}", text(b"a: 1\n b: 2\n"));
        assert!(text(b"- a\n- b\n").starts_with("f:1:1: the file is not a mapping: found a list"));
        assert!(
            text(b"\n# x\n  word\n")
                .starts_with("f:3:3: the file is not a mapping: found a single value")
        );
        assert!(
            text(b"a: 1\nb: \xff\n").starts_with("f:2:4: the file is not UTF-8: found byte 0xff")
        );
        assert!(text(b"\xff\xfea\0").contains("UTF-16"));
        assert!(text(b"a: 1\n---\nb: 2\n").contains("more than one document"));
        assert!(text(b"a: *x\n").contains("anchor"));
        assert!(text(&vec![b'#'; FILE_BYTES_MAX + 1]).contains("too large"));
    }

    #[test]
    fn nested_values_are_named_not_flattened() {
        let entries = parse_ok("a: {x: 1}\nb: [[1]]\nc: !odd 1\nd: !odd [1]\n");

        for entry in &entries {
            assert!(matches!(entry.value, Value::Unusable(_)), "{entry:?}");
        }
    }

    #[test]
    fn bombs_are_refused_quickly() {
        let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for i in 1..12 {
            let items = vec![format!("*a{}", i - 1); 10].join(", ");
            laughs.push_str(&format!("a{i}: &a{i} [{items}]\n"));
        }
        for bomb in [
            laughs,
            "[".repeat(FILE_BYTES_MAX),
            format!("a: {}", "[".repeat(200)),
            format!("a: {}", "- ".repeat(100_000)),
            format!("a: {}{}", "[".repeat(200), "]".repeat(200)),
            "a: &a [*a]\n".to_owned(),
            "? ".repeat(10_000),
            "x: ,\n".repeat(10_000),
        ] {
            assert!(parse("f", bomb.as_bytes()).is_err(), "{:.40}", bomb);
        }
    }
}
