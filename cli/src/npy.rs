//! NumPy's file format (numpy.lib.format version 1.0): the header of an array, whose numbers follow.

/// The header of a C-ordered little-endian float32 array, padded to a multiple of 64 bytes.
pub fn header(shape: &[usize]) -> Vec<u8> {
    let dims: String = shape.iter().map(|n| format!("{n}, ")).collect();
    let dims = if shape.len() == 1 { dims.trim_end() } else { dims.trim_end_matches(", ") };
    let mut dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({dims}), }}");
    let unpadded = 10 + dict.len() + 1;
    dict.push_str(&" ".repeat(unpadded.next_multiple_of(64) - unpadded));
    dict.push('\n');
    let mut h = b"\x93NUMPY\x01\x00".to_vec();
    h.extend((dict.len() as u16).to_le_bytes());
    h.extend(dict.as_bytes());
    h
}

#[cfg(test)]
mod tests {
    #[test]
    fn header() {
        for (shape, text) in [(&[3, 2048][..], "(3, 2048), }"), (&[5], "(5,), }"), (&[], "(), }")] {
            let h = super::header(shape);
            assert_eq!(h.len() % 64, 0);
            assert_eq!(&h[..8], b"\x93NUMPY\x01\x00");
            assert_eq!(usize::from(u16::from_le_bytes([h[8], h[9]])) + 10, h.len());
            assert!(h.ends_with(b"\n"));
            assert!(String::from_utf8_lossy(&h).contains(&format!("'shape': {text}")), "{h:?}");
        }
    }
}
