//! A small language for etcd requests and their replies, one request a line.
//!
//! A line is parsed into etcd's own request message, sent with our generated client, and the reply is printed with
//! every field that is not zero. What differs from server to server (ids, sizes, terms) is printed as a name in
//! angle brackets. The transcripts and the differential test both speak it, so whatever a random run finds can be
//! pasted into a transcript.
//!
//! ```text
//! put KEY VALUE [lease=N] [prev_kv] [ignore_value] [ignore_lease]
//! get KEY [prefix | from | end=END] [limit=N] [rev=N] [sort=TARGET:ORDER] [serializable] [keys_only] [count_only]
//!         [min_mod=N] [max_mod=N] [min_create=N] [max_create=N]
//! del KEY [prefix | from | end=END] [prev_kv]
//! txn if(TARGET KEY [end=END] = VALUE; ...) then(OP; ...) else(OP; ...)      OP: put, get, del, txn or nil
//! compact REV [physical]        grant TTL [id=N]   revoke ID   keepalive ID   ttl ID [keys]   leases
//! watch STREAM create KEY [prefix | from | end=END] [rev=N] [id=N] [prev_kv] [progress_notify] [fragment]
//!                         [noput] [nodelete]
//! watch STREAM cancel ID        watch STREAM progress
//! watch STREAM recv N           prints the next N responses
//! watch STREAM quiet            prints what arrives within a moment
//! watch STREAM drain            prints all events up to the current revision, by watcher
//! ```
//!
//! A word in quotes may hold anything, with the escapes `\0 \n \" \\ \xNN`; `x*1000` is a thousand x. `$lease1` is
//! the first lease id that the server chose, `$member` the member's id.

mod parse;
mod print;
mod run;

pub use run::Session;
