//! Finds the known name nearest to a mistyped one.

/// The candidate with the fewest edits, if few enough that it is probably what was meant.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    /// A longer word is not a mistyped name, and comparing would cost its length squared.
    const WORD_CHARS_MAX: usize = 64;
    let typed: Vec<char> = word.chars().take(WORD_CHARS_MAX + 1).map(plain).collect();
    if typed.is_empty() || WORD_CHARS_MAX < typed.len() {
        return None;
    }
    let allowed = (typed.len() / 3).clamp(1, 4);
    candidates
        .map(|candidate| {
            let known: Vec<char> = candidate.chars().collect();
            (distance(&typed, &known), candidate)
        })
        .filter(|(edits, candidate)| *edits <= allowed && *edits < candidate.len())
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

/// `Cluster_CIDR` and `cluster-cidr` are the same slip.
fn plain(c: char) -> char {
    if c == '_' { '-' } else { c.to_ascii_lowercase() }
}

/// Insertions, deletions, replacements and swaps of neighbours.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut edits = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in edits.iter_mut().enumerate() {
        row[0] = i;
    }
    edits[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replace = edits[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(edits[i - 1][j] + 1).min(edits[i][j - 1] + 1);
            if 1 < i && 1 < j && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(edits[i - 2][j - 2] + 1);
            }
            edits[i][j] = best;
        }
    }
    edits[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(word: &str) -> Option<&'static str> {
        nearest(word, ["cluster-cidr", "service-cidr", "token", "v", "disable"].into_iter())
    }

    #[test]
    fn slips_of_the_keyboard_find_their_key() {
        assert_eq!(near("cluster-cird"), Some("cluster-cidr"));
        assert_eq!(near("Cluster_CIDR"), Some("cluster-cidr"));
        assert_eq!(near("servce-cidr"), Some("service-cidr"));
        assert_eq!(near("--token"), Some("token"));
    }

    #[test]
    fn other_words_find_nothing() {
        assert_eq!(near("kubeconfig"), None);
        assert_eq!(near("x"), None);
        assert_eq!(near(""), None);
        assert_eq!(near(&"cluster-cidr".repeat(1_000)), None);
    }

    #[test]
    fn distance_counts_a_swap_as_one_edit() {
        let chars = |text: &str| text.chars().collect::<Vec<_>>();
        assert_eq!(distance(&chars("ab"), &chars("ba")), 1);
        assert_eq!(distance(&chars("kitten"), &chars("sitting")), 3);
        assert_eq!(distance(&chars(""), &chars("abc")), 3);
    }
}
