//! Masks secret values in a stream of bytes (pure).
//!
//! Every form in which a value is likely to be printed (module `forms`) becomes a needle of one automaton.
//! The automaton's depth is the length of the longest suffix of the stream that may still grow into a
//! needle, so that exactly these bytes are held back and everything else leaves at once. All occurrences
//! are masked, overlapping and touching ones by one mask, which makes the output a function of the stream
//! alone and not of the chunks in which it came.

mod automaton;
mod credentials;
mod forms;

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use automaton::{Automaton, ROOT, State};

pub use credentials::redact_text;

/// Shorter values would mask half of an ordinary log, and a person could guess them from what is left.
pub const MIN_SECRET_BYTES: usize = automaton::MIN_NEEDLE;

/// Bounds the automaton, which takes about 17 bytes of memory for each byte of a needle. The forms of a long
/// value are together 10 to 20 times as long as the value.
pub const MAX_NEEDLE_BYTES: usize = 4 << 20;

/// What stands in the log where a secret value was.
pub const MASK: &str = "***";

/// A secret of the build.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretValue {
    /// The id under which the Dockerfile mounts it; may be shown.
    pub name: String,
    /// The value; never shown.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretValue").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A secret cannot be kept out of the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RedactError {
    /// The value is shorter than [`MIN_SECRET_BYTES`].
    #[error(
        "secret `{name}` has {length} bytes without the white space around it; a value under {minimum} bytes cannot be masked in the log, use a longer one"
    )]
    TooShort {
        /// Id of the secret.
        name: String,
        /// Bytes without leading and trailing white space.
        length: usize,
        /// The shortest value that is masked.
        minimum: usize,
    },
    /// The values up to this one need more memory than one build may take for masking.
    #[error(
        "secret `{name}` is too long to be masked in the log: its forms and those of the secrets before it have {needed} bytes, the limit is {limit}; mount large files that are not secret from the context"
    )]
    TooLong {
        /// Id of the secret with which the limit was passed.
        name: String,
        /// Bytes of all forms so far.
        needed: usize,
        /// [`MAX_NEEDLE_BYTES`].
        limit: usize,
    },
}

/// Masks the values of some secrets in one stream.
///
/// Clones share the automaton; [`Redactor::fresh`] starts on another stream.
#[derive(Clone)]
pub struct Redactor {
    /// None if there is nothing to mask.
    automaton: Option<Arc<Automaton>>,
    state: State,
    /// The bytes that have come but not left.
    held: Vec<u8>,
    /// What is to be masked, sorted and apart from each other, as offsets into `held`.
    masks: VecDeque<(usize, usize)>,
    /// The last thing that left was a mask; a match that touches it adds nothing.
    after_mask: bool,
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redactor").field("held", &self.held.len()).finish_non_exhaustive()
    }
}

impl Redactor {
    /// A redactor for these secrets.
    ///
    /// A value of nothing but white space holds no secret and is skipped (an empty file as an optional
    /// secret is common); white space around a value does not count.
    pub fn new(secrets: impl IntoIterator<Item = SecretValue>) -> Result<Self, RedactError> {
        let mut needles = Vec::new();
        let mut needed = 0;
        for secret in secrets {
            let value = secret.bytes.trim_ascii();
            check_length(&secret.name, value)?;
            check_total(&secret.name, needed + value.len())?;
            let forms = forms::of(&secret.bytes);
            needed += forms.iter().map(Vec::len).sum::<usize>();
            needles.extend(forms);
            check_total(&secret.name, needed)?;
        }
        Ok(Self::over(needles))
    }

    fn over(needles: Vec<Vec<u8>>) -> Self {
        let automaton = (!needles.is_empty()).then(|| Arc::new(Automaton::new(needles)));
        Self { automaton, state: ROOT, held: Vec::new(), masks: VecDeque::new(), after_mask: false }
    }

    /// A redactor for the same secrets at the start of another stream.
    #[must_use]
    pub fn fresh(&self) -> Self {
        Self {
            automaton: self.automaton.clone(),
            state: ROOT,
            held: Vec::new(),
            masks: VecDeque::new(),
            after_mask: false,
        }
    }

    /// Takes the next bytes of the stream and appends to `out` what is certain by now.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let Some(automaton) = self.automaton.clone() else {
            out.extend_from_slice(bytes);
            return;
        };
        let before = self.held.len();
        let masks = &mut self.masks;
        self.state = automaton.scan(self.state, bytes, |end, length| {
            let end = before + end;
            // Bytes of a match that have left are masked already; what is left of it begins at 0.
            record(masks, end.saturating_sub(length), end);
        });
        let open = automaton.depth(self.state);
        self.release((before + bytes.len()).saturating_sub(open), bytes, out);
    }

    /// Bytes that are held back because they may be the start of a secret.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Ends the stream.
    ///
    /// A start of a secret that is long enough to be one is masked: a cancelled build may have been
    /// killed in the middle of printing it.
    pub fn finish(mut self, out: &mut Vec<u8>) {
        let open = self.automaton.as_ref().map_or(0, |automaton| automaton.depth(self.state));
        let end = self.held.len();
        if open >= MIN_SECRET_BYTES && end > 0 {
            record(&mut self.masks, end.saturating_sub(open), end);
        }
        self.release(end, &[], out);
    }

    /// The text without secret values and without credentials in URLs, for error messages.
    pub fn redact_text(&self, text: &str) -> String {
        let mut out = Vec::with_capacity(text.len());
        let mut redactor = self.fresh();
        redactor.push(text.as_bytes(), &mut out);
        redactor.finish(&mut out);
        redact_text(&String::from_utf8_lossy(&out))
    }

    /// Lets go of everything before `safe`, an offset into `held` followed by `bytes`.
    fn release(&mut self, safe: usize, bytes: &[u8], out: &mut Vec<u8>) {
        let mut done = 0;
        // No later match begins before `safe`, so that a mask from there on has its final start.
        while let Some(&(start, end)) = self.masks.front()
            && start <= safe
        {
            let touches = self.after_mask && start <= done;
            if !touches {
                copy(&self.held, bytes, done, start, out);
                out.extend_from_slice(MASK.as_bytes());
            }
            self.after_mask = true;
            done = end;
            self.masks.pop_front();
        }
        if safe > done {
            copy(&self.held, bytes, done, safe, out);
            self.after_mask = false;
            done = safe;
        }
        self.keep_from(done, bytes);
    }

    /// Drops what has left and takes in what has come.
    fn keep_from(&mut self, done: usize, bytes: &[u8]) {
        let before = self.held.len();
        self.held.drain(..done.min(before));
        self.held.extend_from_slice(&bytes[done.saturating_sub(before)..]);
        for (start, end) in &mut self.masks {
            *start -= done;
            *end -= done;
        }
    }
}

fn check_length(name: &str, value: &[u8]) -> Result<(), RedactError> {
    if value.is_empty() || value.len() >= MIN_SECRET_BYTES {
        return Ok(());
    }
    Err(RedactError::TooShort { name: name.to_owned(), length: value.len(), minimum: MIN_SECRET_BYTES })
}

fn check_total(name: &str, needed: usize) -> Result<(), RedactError> {
    if needed <= MAX_NEEDLE_BYTES {
        return Ok(());
    }
    Err(RedactError::TooLong { name: name.to_owned(), needed, limit: MAX_NEEDLE_BYTES })
}

/// Adds a match that ends after all earlier ones, merged with those that it overlaps or touches.
fn record(masks: &mut VecDeque<(usize, usize)>, mut start: usize, end: usize) {
    while let Some(&(earlier, stop)) = masks.back()
        && stop >= start
    {
        start = start.min(earlier);
        masks.pop_back();
    }
    masks.push_back((start, end));
}

/// Appends `from..to` of `held` followed by `bytes`.
fn copy(held: &[u8], bytes: &[u8], from: usize, to: usize, out: &mut Vec<u8>) {
    let border = held.len();
    out.extend_from_slice(&held[from.min(border)..to.min(border)]);
    out.extend_from_slice(&bytes[from.saturating_sub(border)..to.saturating_sub(border)]);
}

#[cfg(test)]
mod tests;
