//! Names and keys of split files (`model-00002-of-00003.gguf`, llama-gguf-split's convention). Knows no tensor.

use std::path::{Path, PathBuf};

use super::error::ErrorKind;
use super::header::Header;

pub(super) const KEY_NO: &str = "split.no";
pub(super) const KEY_COUNT: &str = "split.count";
pub(super) const KEY_TENSORS: &str = "split.tensors.count";

/// A file name taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SplitName {
    prefix: PathBuf,
    /// Counted from 0.
    pub index: u64,
    pub count: u64,
}

impl SplitName {
    /// Reads `prefix-00002-of-00003.gguf`; `None` for any other name.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = number_at_end(name)?;
        let (prefix, number) = number_at_end(rest.strip_suffix("-of-")?)?;
        let prefix = prefix.strip_suffix('-')?;
        (number >= 1 && number <= count).then(|| Self {
            prefix: path.with_file_name(prefix),
            index: number - 1,
            count,
        })
    }

    /// The path of part `index`, counted from 0.
    pub(super) fn part(&self, index: u64) -> PathBuf {
        let mut path = self.prefix.clone().into_os_string();
        path.push(format!("-{:05}-of-{:05}.gguf", index + 1, self.count));
        path.into()
    }
}

/// Splits five digits off the end.
fn number_at_end(s: &str) -> Option<(&str, u64)> {
    let (rest, digits) = s.split_at_checked(s.len().checked_sub(5)?)?;
    (digits.bytes().all(|b| b.is_ascii_digit())).then_some(())?;
    Some((rest, digits.parse().ok()?))
}

/// Number of parts that the header speaks of; 1 if it is not split.
pub(super) fn count(header: &Header) -> Result<u64, ErrorKind> {
    Ok(header.metadata.u64(KEY_COUNT)?.unwrap_or(1).max(1))
}

/// Checks that `header` calls itself part `index` of `count`.
pub(super) fn check(header: &Header, index: u64, count: u64) -> Result<(), ErrorKind> {
    expect(header, KEY_COUNT, count)?;
    expect(header, KEY_NO, index)
}

/// Checks that `key` is there and equals `expected`.
pub(super) fn expect(header: &Header, key: &'static str, expected: u64) -> Result<(), ErrorKind> {
    let found = header.metadata.u64(key)?;
    if found == Some(expected) {
        return Ok(());
    }
    let found = found.map_or("absent".into(), |n| n.to_string());
    Err(ErrorKind::Split { key, found, expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let n = SplitName::of(Path::new("/a/b/m-x-00002-of-00003.gguf")).unwrap();
        assert_eq!((n.index, n.count), (1, 3));
        assert_eq!(n.part(2), Path::new("/a/b/m-x-00003-of-00003.gguf"));
        for bad in [
            "m.gguf",
            "m-00000-of-00003.gguf",
            "m-00004-of-00003.gguf",
            "m-1-of-3.gguf",
            "m-00001-of-00003",
            "m00001-of-00003.gguf",
            "-of-00003.gguf",
            "é0001-of-00003.gguf",
            "m-+0001-of-00003.gguf",
        ] {
            assert_eq!(SplitName::of(Path::new(bad)), None, "{bad}");
        }
    }
}
