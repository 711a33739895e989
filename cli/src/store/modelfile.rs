//! Modelfiles: Ollama's instructions, with Jinja for the template. Knows nothing of where models lie.

use super::parameters::Parameters;
use anyhow::{Result, anyhow, bail};
use serde_json::{Value, json};
use std::fmt::Write;

/// What a Modelfile says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Modelfile {
    /// A path or the name of a model.
    pub from: String,
    pub parameters: Parameters,
    pub system: Option<String>,
    /// Jinja.
    pub template: Option<String>,
    pub license: Vec<String>,
    /// `{"role", "content"}` each.
    pub messages: Vec<Value>,
}

/// Modelfiles are small; what is not is none.
pub const MOST_BYTES: usize = 16 << 20;

impl Modelfile {
    /// Reads one.
    ///
    /// # Errors
    /// The first thing that is wrong, with its line.
    pub fn parse(text: &str) -> Result<Self> {
        if text.len() > MOST_BYTES {
            bail!("{} bytes: that is no Modelfile", text.len());
        }
        let mut out = Self::default();
        let mut lines = text.lines().enumerate();
        while let Some((i, line)) = lines.next() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            let mut value = |rest: &str| value(rest.trim(), &mut lines);
            let set = match command.to_ascii_uppercase().as_str() {
                "FROM" if !out.from.is_empty() => Err(anyhow!("a second FROM")),
                "FROM" => value(rest).map(|v| out.from = v),
                "PARAMETER" => match rest.trim().split_once(char::is_whitespace) {
                    Some((name, text)) => value(text).and_then(|v| out.parameters.set_text(name, &v)),
                    None => Err(anyhow!("PARAMETER takes a name and a value")),
                },
                "SYSTEM" => value(rest).map(|v| out.system = Some(v)),
                "TEMPLATE" => value(rest).and_then(|v| {
                    check_template(&v)?;
                    out.template = Some(v);
                    Ok(())
                }),
                "LICENSE" => value(rest).map(|v| out.license.push(v)),
                "MESSAGE" => message(rest.trim(), value).map(|m| out.messages.push(m)),
                // The version of Ollama that is wanted says nothing about us.
                "REQUIRES" => Ok(()),
                "ADAPTER" => Err(anyhow!(
                    "adapters are not applied: merge the adapter into the model first (llama-export-lora)"
                )),
                other => Err(anyhow!(
                    "unknown instruction {:?} (FROM PARAMETER TEMPLATE SYSTEM LICENSE MESSAGE)",
                    other.chars().take(40).collect::<String>()
                )),
            };
            set.map_err(|e| anyhow!("line {}: {e}", i + 1))?;
        }
        if out.from.is_empty() {
            bail!("no FROM: it names the model, a GGUF file or the name of another model");
        }
        Ok(out)
    }
}

impl std::fmt::Display for Modelfile {
    /// Written so that [`Modelfile::parse`] reads the same.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut o = String::new();
        writeln!(o, "FROM {}", self.from)?;
        let block = |o: &mut String, name: &str, text: &str| writeln!(o, "{name} \"\"\"{text}\"\"\"");
        if let Some(t) = &self.template {
            block(&mut o, "TEMPLATE", t)?;
        }
        if let Some(s) = &self.system {
            block(&mut o, "SYSTEM", s)?;
        }
        for (name, value) in self.parameters.as_json() {
            let each = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
            for v in each {
                let text = match v.as_str() {
                    None => v.to_string(),
                    Some(s) if s.is_empty() || s.contains(['"', '\n']) => format!("\"\"\"{s}\"\"\""),
                    Some(s) if s.contains(char::is_whitespace) => format!("\"{s}\""),
                    Some(s) => s.to_owned(),
                };
                writeln!(o, "PARAMETER {name} {text}")?;
            }
        }
        for m in &self.messages {
            let text = |key: &str| m[key].as_str().unwrap_or_default();
            block(&mut o, &format!("MESSAGE {}", text("role")), text("content"))?;
        }
        self.license.iter().try_for_each(|l| block(&mut o, "LICENSE", l))?;
        f.write_str(&o)
    }
}

fn message(rest: &str, mut value: impl FnMut(&str) -> Result<String>) -> Result<Value> {
    let (role, text) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let role = role.to_ascii_lowercase();
    if !["system", "user", "assistant"].contains(&role.as_str()) {
        bail!("MESSAGE takes system, user or assistant, then the text");
    }
    Ok(json!({"role": role, "content": value(text)?}))
}

/// A value: the rest of the line, or what is quoted, which may go on for lines.
fn value<'t>(first: &str, lines: &mut impl Iterator<Item = (usize, &'t str)>) -> Result<String> {
    let quote = match first {
        _ if first.starts_with("\"\"\"") => "\"\"\"",
        _ if first.starts_with('"') => "\"",
        "" => bail!("a value is missing"),
        _ => return Ok(first.to_owned()),
    };
    let mut text = first[quote.len()..].to_owned();
    loop {
        // A single quote ends the value only at the end of a line: texts quote words.
        let end =
            if quote == "\"" { text.trim_end().strip_suffix(quote).map(str::len) } else { text.find(quote) };
        if let Some(mut end) = end {
            // A text may end with a quotation mark of its own.
            while text[end + quote.len()..].starts_with('"') {
                end += 1;
            }
            if !text[end + quote.len()..].trim().is_empty() {
                bail!("text behind the closing {quote}");
            }
            text.truncate(end);
            return Ok(text);
        }
        let Some((_, line)) = lines.next() else { bail!("no closing {quote}") };
        text.push('\n');
        text.push_str(line);
    }
}

/// Refuses templates that are written for Go, and what is no Jinja.
pub fn check_template(text: &str) -> Result<()> {
    if is_go(text) {
        bail!(
            "TEMPLATE is a Go template; rsinfer renders Jinja: leave TEMPLATE out to use the one in the model's file \
             (`rsinfer show` tells whether it has one), or write it in Jinja"
        );
    }
    engine::text::ChatTemplate::new(text, "", "")?;
    Ok(())
}

/// Whether a template is written for Go's text/template: expressions begin with a dot, a variable or a Go keyword.
pub fn is_go(text: &str) -> bool {
    let inner = |at: usize| text[at + 2..].trim_start_matches('-').trim_start();
    !text.contains("{%")
        && text.match_indices("{{").any(|(at, _)| {
            let inside = inner(at);
            let word = inside.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or("");
            inside.starts_with(['.', '$'])
                || inside.starts_with("/*")
                || ["if", "else", "end", "range", "with", "define", "template", "block"].contains(&word)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"# a model
from ./tiny.gguf
PARAMETER temperature 0.5
PARAMETER stop "<|end|>"
parameter stop User:
PARAMETER kv sinks:4+window:1000

SYSTEM """
You are "brief".
"""
MESSAGE user Hi "there"
MESSAGE assistant "Hello
you"
LICENSE """MIT"""
TEMPLATE "{{ messages[0].content }}"
"#;

    #[test]
    fn modelfiles_are_read_and_written() {
        let m = Modelfile::parse(WHOLE).unwrap();
        assert_eq!((m.from.as_str(), m.system.as_deref()), ("./tiny.gguf", Some("\nYou are \"brief\".\n")));
        assert_eq!(m.parameters.stop(), ["<|end|>", "User:"]);
        assert_eq!(m.parameters.float("temperature"), Some(0.5));
        assert_eq!(m.messages[0], json!({"role": "user", "content": "Hi \"there\""}));
        assert_eq!(m.messages[1]["content"], "Hello\nyou");
        assert_eq!(m.license, ["MIT"]);
        assert_eq!(Modelfile::parse(&m.to_string()).unwrap(), m);
    }

    #[test]
    fn errors_name_the_line() {
        for (text, words) in [
            ("", "no FROM"),
            ("FROM a\nPARAMETER nonsense 1", "line 2: unknown parameter \"nonsense\""),
            ("FROM a\nPARAMETER top_k", "line 2"),
            ("FROM a\n\nPARAMETER top_k many", "line 3: parameter top_k takes a whole number"),
            ("FROM a\nADAPTER b", "line 2: adapters"),
            ("FROM a\nNONSENSE b", "NONSENSE"),
            ("FROM a\nSYSTEM \"\"\"x\ny", "line 2: no closing \"\"\""),
            ("FROM a\nSYSTEM \"\"\"x\"\"\" y", "text behind"),
            ("FROM a\nFROM b", "line 2: a second FROM"),
            ("FROM", "line 1: a value is missing"),
            ("FROM a\nMESSAGE robot x", "system, user or assistant"),
            ("FROM a\nTEMPLATE {{ if .System }}x{{ end }}", "line 2: TEMPLATE is a Go template"),
            ("FROM a\nTEMPLATE {{- .Prompt }}", "Jinja"),
            ("FROM a\nTEMPLATE {% if %}", "line 2: chat template"),
        ] {
            let e = Modelfile::parse(text).unwrap_err().to_string();
            assert!(e.contains(words), "{text:?}: {e}");
        }
    }

    #[test]
    fn jinja_is_told_from_go() {
        for go in ["{{ .Prompt }}", "{{range .Messages}}{{end}}", "{{- /* x */ -}}", "{{ $x := 1 }}"] {
            assert!(is_go(go), "{go}");
        }
        for jinja in [
            "{{ messages }}",
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "{{ '.x' }}",
            "{{ endings }}",
            "plain",
        ] {
            assert!(!is_go(jinja), "{jinja}");
        }
    }
}
