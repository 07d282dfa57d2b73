//! Finds many needles in a stream in linear time (pure).
//!
//! An Aho–Corasick automaton of our own, because exact hold-back needs the depth of the state, which the
//! usual crate does not tell. States are numbered breadth first, so that the children of a state lie side
//! by side and four words and a byte describe it. Far from any needle the automaton is not walked at all:
//! a table of byte pairs tells how far the next possible start is away.

/// The shortest needle; the skip table looks at windows of this size.
pub(super) const MIN_NEEDLE: usize = 6;

/// The last pair of a window, as an offset.
const PAIR: usize = MIN_NEEDLE - 2;

/// A state of the automaton.
pub(super) type State = u32;

/// No needle is open.
pub(super) const ROOT: State = 0;

/// The needles, ready to be searched for.
pub(super) struct Automaton {
    /// The byte that leads into a state.
    label: Vec<u8>,
    /// The children of `s` are `first_child[s]..first_child[s + 1]`.
    first_child: Vec<State>,
    /// The longest proper suffix of a state that is a state.
    fail: Vec<State>,
    /// Bytes from the root.
    depth: Vec<u32>,
    /// Length of the longest needle that ends in a state, 0 if none does.
    found: Vec<u32>,
    /// Successors of the root, which has too many children for a search.
    from_root: Vec<State>,
    /// How far a window may move on, by its last two bytes.
    shift: Vec<u8>,
}

impl Automaton {
    /// An automaton for needles of at least [`MIN_NEEDLE`] bytes.
    pub(super) fn new(mut needles: Vec<Vec<u8>>) -> Self {
        needles.sort_unstable();
        needles.dedup();
        debug_assert!(needles.iter().all(|needle| needle.len() >= MIN_NEEDLE), "a needle is too short");
        let mut automaton = Self::trie(&needles);
        automaton.shift = shifts(&needles);
        automaton.link();
        automaton
    }

    /// The trie, level by level: a state is a range of sorted needles that share their first bytes.
    fn trie(needles: &[Vec<u8>]) -> Self {
        let mut trie = Self {
            label: vec![0],
            first_child: Vec::new(),
            fail: Vec::new(),
            depth: vec![0],
            found: vec![0],
            from_root: vec![ROOT; 256],
            shift: Vec::new(),
        };
        let mut ranges = vec![(0, needles.len())];
        let mut state = 0;
        while state < ranges.len() {
            let (mut start, end) = ranges[state];
            let depth = trie.depth[state];
            trie.first_child.push(number(trie.label.len()));
            let byte_at = |needle: &[u8]| needle.get(index(depth)).copied();
            for group in needles[start..end].chunk_by(|a, b| byte_at(a) == byte_at(b)) {
                match byte_at(&group[0]) {
                    // Sorted and without duplicates, the one needle that ends here comes first.
                    None => trie.found[state] = depth,
                    Some(byte) => {
                        trie.add(byte, depth + 1);
                        ranges.push((start, start + group.len()));
                    }
                }
                start += group.len();
            }
            state += 1;
        }
        trie.first_child.push(number(trie.label.len()));
        trie
    }

    fn add(&mut self, label: u8, depth: u32) {
        self.label.push(label);
        self.depth.push(depth);
        self.found.push(0);
    }

    /// Where the search goes on after a mismatch, and what ends inside of longer needles.
    fn link(&mut self) {
        self.fail = vec![ROOT; self.label.len()];
        for child in self.children(ROOT) {
            self.from_root[usize::from(self.label[child])] = number(child);
        }
        for state in 1..number(self.label.len()) {
            let inherited = self.found[index(self.fail[index(state)])];
            if self.found[index(state)] == 0 {
                self.found[index(state)] = inherited;
            }
            for child in self.children(state) {
                self.fail[child] = self.step(self.fail[index(state)], self.label[child]);
            }
        }
    }

    fn children(&self, state: State) -> std::ops::Range<usize> {
        index(self.first_child[index(state)])..index(self.first_child[index(state) + 1])
    }

    fn child(&self, state: State, byte: u8) -> Option<State> {
        let children = self.children(state);
        let first = children.start;
        self.label[children].iter().position(|&label| label == byte).map(|at| number(first + at))
    }

    fn step(&self, mut state: State, byte: u8) -> State {
        while state != ROOT {
            if let Some(next) = self.child(state, byte) {
                return next;
            }
            state = self.fail[index(state)];
        }
        self.from_root[usize::from(byte)]
    }

    /// Length of the longest suffix of the stream that is the start of a needle.
    pub(super) fn depth(&self, state: State) -> usize {
        index(self.depth[index(state)])
    }

    /// Reads `bytes`; tells the end (as an offset into `bytes`) and length of the longest match at every
    /// end, in order of the ends. Returns the state to go on from.
    pub(super) fn scan(&self, mut state: State, bytes: &[u8], mut found: impl FnMut(usize, usize)) -> State {
        let mut at = 0;
        while at < bytes.len() {
            let depth = self.depth(state);
            // A needle of which less than a window is open is found again from its start.
            if depth < MIN_NEEDLE && depth <= at {
                match self.skip(bytes, at - depth) {
                    Skip::Candidate(next, reached) => (at, state) = (next, reached),
                    Skip::Rest(next) => {
                        return bytes[next..].iter().fold(ROOT, |s, &byte| self.step(s, byte));
                    }
                }
            } else {
                state = self.step(state, bytes[at]);
                at += 1;
            }
            let length = self.found[index(state)];
            if length > 0 {
                found(at, index(length));
            }
        }
        state
    }

    /// The next place at which a needle's first bytes are, if any, from `at` on.
    fn skip(&self, bytes: &[u8], mut at: usize) -> Skip {
        while let Some(window) = bytes.get(at..at + MIN_NEEDLE) {
            let shift = self.shift[pair(window[PAIR], window[PAIR + 1])];
            if shift == 0
                && let Some(state) = self.walk(window)
            {
                return Skip::Candidate(at + MIN_NEEDLE, state);
            }
            at += usize::from(shift.max(1));
        }
        Skip::Rest(at)
    }

    fn walk(&self, window: &[u8]) -> Option<State> {
        let first = self.from_root[usize::from(window[0])];
        let start = (first != ROOT).then_some(first)?;
        window[1..].iter().try_fold(start, |state, &byte| self.child(state, byte))
    }
}

enum Skip {
    /// A window is the start of a needle; its end and the state there.
    Candidate(usize, State),
    /// Less than a window is left from here.
    Rest(usize),
}

/// Two bytes at offset `i` of a window leave room for a start `PAIR - i` further on; pairs that no needle
/// has let the window pass them.
fn shifts(needles: &[Vec<u8>]) -> Vec<u8> {
    let longest = u8::try_from(PAIR + 1).unwrap_or(u8::MAX);
    let mut shifts = vec![longest; 1 << 16];
    for needle in needles {
        for (shift, two) in (0..longest).rev().zip(needle.windows(2)) {
            let entry = &mut shifts[pair(two[0], two[1])];
            *entry = shift.min(*entry);
        }
    }
    shifts
}

fn pair(first: u8, second: u8) -> usize {
    usize::from(first) << 8 | usize::from(second)
}

/// States are bounded by `MAX_NEEDLE_BYTES`, far below the limit of the type.
fn number(index: usize) -> State {
    State::try_from(index).unwrap_or(State::MAX)
}

fn index(number: u32) -> usize {
    number as usize
}
