//! llama.cpp's spelling of options to clap's: `-ctk` and other long names with a single dash, and underscores in long
//! names. Clap would read `-ctk` as `-c tk`. Knows the spelling only, not what the options mean.

use std::ffi::OsString;

/// Single-dash names of more than one letter.
const LONG: &[(&str, &str)] = &[
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-sys", "--system-prompt"),
    ("-sysf", "--system-prompt-file"),
    ("-pg", "--prompt-gen"),
    ("-bf", "--binary-file"),
    ("-ngl", "--gpu-layers"),
    ("-mg", "--main-gpu"),
    ("-ts", "--tensor-split"),
    ("-ot", "--override-tensor"),
    ("-np", "--parallel"),
    ("-cmoe", "--cpu-moe"),
    ("-ncmoe", "--n-cpu-moe"),
];

/// Options whose value is free text, which may look like an option itself.
const TEXT: &[&str] =
    &["-p", "--prompt", "-sys", "--system-prompt", "--stop", "-r", "--reverse-prompt", "--kwargs"];

/// Rewrites what comes after the program's name.
pub fn normalize(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut out: Vec<OsString> = Vec::new();
    let (mut is_value, mut rest_is_plain) = (true, false);
    for arg in args {
        let Some(s) = arg.to_str().filter(|_| !is_value && !rest_is_plain) else {
            is_value = false;
            out.push(arg);
            continue;
        };
        rest_is_plain = s == "--";
        is_value = TEXT.contains(&s);
        if let Some((_, long)) = LONG.iter().find(|(short, _)| *short == s) {
            out.push(long.into());
        } else if let Some(name) = s.strip_prefix("--") {
            let (name, value) = name.split_at(name.find('=').unwrap_or(name.len()));
            out.push(format!("--{}{value}", name.replace('_', "-")).into());
        } else {
            out.push(arg);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(given: &str, want: &str) {
        let got = normalize(given.split(' ').map(OsString::from));
        assert_eq!(got, want.split(' ').map(OsString::from).collect::<Vec<_>>());
    }

    #[test]
    fn spellings() {
        check("rsinfer run m -ctk f16 --top_k 4", "rsinfer run m --cache-type-k f16 --top-k 4");
        check("rsinfer run m -c 12 -sys -pg", "rsinfer run m -c 12 --system-prompt -pg");
        check("rsinfer run m -p -ctk -- -ctk", "rsinfer run m -p -ctk -- -ctk");
        check("rsinfer run --logit_bias=1_0", "rsinfer run --logit-bias=1_0");
    }
}
