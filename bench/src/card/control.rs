//! The card's control socket: one line in, one JSON line out.
//!
//! Commands: `counters` · `slow on|off` · `stall MS` · `factor F` · `lie on|off` · `failwrites on|off` · `cut` ·
//! `restore KEEP none|prefix|garbage SEED`.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::disk::Card;
use super::state::Tear;

/// Asks a card.
pub fn ask(socket: &Path, command: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    writeln!(stream, "{command}")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    if answer.contains("\"error\"") {
        return Err(io::Error::other(format!("card: {command}: {}", answer.trim())));
    }
    Ok(answer)
}

/// Answers until the process ends.
pub fn serve(card: Arc<Card>, socket: &Path) -> io::Result<()> {
    let listener = UnixListener::bind(socket)?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // One question at a time; each takes microseconds.
            drop(answer(&card, stream));
        }
    });
    Ok(())
}

fn answer(card: &Card, mut stream: UnixStream) -> io::Result<()> {
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let answer = obey(card, &words).unwrap_or_else(|error| json!({ "error": error }));
    writeln!(stream, "{answer}")
}

fn obey(card: &Card, words: &[&str]) -> Result<serde_json::Value, String> {
    let mut state = card.state();
    match words {
        ["counters"] => return serde_json::to_value(state.counters()).map_err(|e| e.to_string()),
        ["slow", on] => state.set_slow(*on == "on"),
        ["stall", ms] => state.stall(Duration::from_millis(number(ms)?)),
        ["factor", factor] => state.factor = number(factor)?,
        ["lie", on] => state.lies = *on == "on",
        ["failwrites", on] => state.fails_writes = *on == "on",
        ["cut"] => state.cut = true,
        ["restore", keep, tear, seed] => {
            let tear = match *tear {
                "none" => Tear::None,
                "prefix" => Tear::Prefix,
                "garbage" => Tear::Garbage,
                other => return Err(format!("{other}: expected none, prefix or garbage")),
            };
            let (kept, dropped) = state
                .restore(&card.image, number(keep)?, tear, number(seed)?)
                .map_err(|error| error.to_string())?;
            return Ok(json!({ "kept": kept, "dropped": dropped }));
        }
        _ => return Err("no such command".to_owned()),
    }
    Ok(json!({}))
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text}: expected a number"))
}
