//! A conversation on the terminal, with Ollama's commands. Ctrl-C ends an answer, not the program; Ctrl-D leaves.

use super::conversation::Conversation;
use super::{RunConfig, settings};
use crate::model::Source;
use crate::output;
use anyhow::{Context, Result, bail};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by Ctrl-C while an answer is being made.
static CANCELLED: AtomicBool = AtomicBool::new(false);

const HELP: &str = "\
Commands:
  /set            change a setting (/set alone lists them)
  /show           show what is set and loaded (/show alone lists them)
  /clear          forget the conversation
  /save FILE      write the conversation to a file
  /load FILE      go on with a saved conversation, or load another model
  /bye            leave (also Ctrl-D)
  /?, /help       this help
\"\"\" begins and ends a text of several lines. Ctrl-C stops an answer.
";

const SET_HELP: &str = "\
  /set parameter NAME VALUE    sampling and context (/set parameter alone lists them)
  /set system TEXT             the system prompt; without TEXT, none
  /set think | nothink         ask the model to think, or not to
  /set hidethinking | showthinking
  /set verbose | quiet         timings after every answer, or none
";

const SHOW_HELP: &str = "\
  /show info | parameters | system | template | messages
";

/// What to do after a line.
enum Next {
    Go,
    Leave,
}

/// Talks until the user leaves.
pub fn run(mut c: Conversation) -> Result<()> {
    ctrlc::set_handler(|| {
        // A second one while the first is not served yet (a long prompt is being computed) ends the program.
        if CANCELLED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .context("cannot catch Ctrl-C")?;
    let mut editor = DefaultEditor::new().context("cannot use this terminal")?;
    let history = history_file();
    if let Some(path) = &history {
        // No history yet is the usual case at first.
        let _ = editor.load_history(path);
    }
    eprintln!("{}: /? for help, Ctrl-D to leave", c.model.info().name);
    loop {
        match read(&mut editor) {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) => {
                let _ = editor.add_history_entry(line.as_str());
                match handle(&mut c, &line) {
                    Ok(Next::Go) => {}
                    Ok(Next::Leave) => break,
                    Err(e) if output::is_broken_pipe(&e) => return Err(e),
                    Err(e) => eprintln!("error: {}", output::one_line(&format!("{e:#}"))),
                }
            }
            Err(ReadlineError::Interrupted) => eprintln!("(Ctrl-D or /bye to leave)"),
            Err(ReadlineError::Eof) => break,
            Err(e) => return Err(e).context("cannot read from the terminal"),
        }
    }
    if let Some(path) = &history {
        let _ = path.parent().map(std::fs::create_dir_all);
        if let Err(e) = editor.save_history(path) {
            eprintln!("note: the history could not be saved in {}: {e}", path.display());
        }
    }
    Ok(())
}

fn history_file() -> Option<PathBuf> {
    let env = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let state = env("XDG_STATE_HOME").or_else(|| env("HOME").map(|h| h.join(".local/state")))?;
    Some(state.join("rsinfer").join("history"))
}

/// A line, or the lines between `\"\"\"`.
fn read(editor: &mut DefaultEditor) -> Result<String, ReadlineError> {
    let line = editor.readline(">>> ")?;
    let Some(rest) = line.trim_start().strip_prefix("\"\"\"") else { return Ok(line) };
    let mut text = rest.to_owned();
    loop {
        if let Some(done) = text.trim_end().strip_suffix("\"\"\"") {
            return Ok(done.to_owned());
        }
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&editor.readline("... ")?);
    }
}

fn handle(c: &mut Conversation, line: &str) -> Result<Next> {
    if !line.starts_with('/') {
        CANCELLED.store(false, Ordering::SeqCst);
        let done = c.say(line, || CANCELLED.load(Ordering::SeqCst))?;
        CANCELLED.store(false, Ordering::SeqCst);
        c.explain(&done);
        eprintln!();
        return Ok(Next::Go);
    }
    let line = line.trim();
    let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim();
    match command {
        "/bye" | "/exit" | "/quit" => return Ok(Next::Leave),
        "/?" | "/help" => match rest.trim_start_matches('/') {
            "set" => output::print(SET_HELP)?,
            "show" => output::print(SHOW_HELP)?,
            _ => output::print(HELP)?,
        },
        "/clear" => {
            c.clear();
            eprintln!("the conversation is forgotten");
        }
        "/save" if rest.is_empty() => bail!("/save needs a file name"),
        "/save" => {
            c.save(Path::new(rest))?;
            eprintln!("saved {} messages in {rest}", c.messages.len());
        }
        "/load" if rest.is_empty() => bail!("/load needs a file name"),
        "/load" => load(c, rest)?,
        "/set" => set(c, rest)?,
        "/show" => show(c, rest)?,
        _ => bail!("unknown command {command}; /? lists them"),
    }
    Ok(Next::Go)
}

/// A saved conversation, or another model in place of this one.
fn load(c: &mut Conversation, name: &str) -> Result<()> {
    let is_model = || -> Result<bool> {
        let mut magic = [0u8; 4];
        let mut file = std::fs::File::open(name).with_context(|| format!("cannot read {name}"))?;
        Ok(std::io::Read::read_exact(&mut file, &mut magic).is_ok() && &magic == b"GGUF")
    };
    let source = Source::named(name);
    if source.as_ref().is_ok_and(|s| *s == Source::Demo || !Path::new(name).exists()) || is_model()? {
        let mut config = c.config.clone();
        config.load.source = source?;
        *c = Conversation::open(config)?;
        eprintln!("loaded {}", c.model.info().name);
    } else {
        c.load(Path::new(name))?;
        eprintln!("{} messages, {name}", c.messages.len());
    }
    Ok(())
}

fn set(c: &mut Conversation, rest: &str) -> Result<()> {
    let (what, value) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let value = value.trim();
    let mut config: RunConfig = c.config.clone();
    match what {
        "" => return Ok(output::print(SET_HELP)?),
        "parameter" | "parameters" if value.is_empty() => {
            return Ok(output::print(&settings::show(&config, c.ctx()))?);
        }
        "parameter" | "parameters" => {
            let words: Vec<&str> = value.split_whitespace().collect();
            settings::set(&mut config, words[0], &words[1..])?;
        }
        "system" => {
            let text = value.trim_matches('"');
            config.chat.system = (!text.is_empty()).then(|| text.to_owned());
        }
        "think" => config.chat.think = Some(true),
        "nothink" => config.chat.think = Some(false),
        "hidethinking" => config.hide_thinking = true,
        "showthinking" => config.hide_thinking = false,
        "verbose" => config.verbose = true,
        "quiet" => config.verbose = false,
        _ => bail!("unknown setting {what:?}; /set lists them"),
    }
    c.apply(config)
}

fn show(c: &Conversation, what: &str) -> Result<()> {
    let i = c.model.info();
    let text = match what {
        "" => SHOW_HELP.into(),
        "info" => format!(
            "  name         {}\n  file         {}\n  architecture {}\n  layers       {}\n  parameters   {}\n  size         {}\n  context      {} (trained for {})\n  device       {}\n",
            output::one_line(&i.name),
            c.config.load.source.name(),
            i.arch,
            i.n_layers,
            i.n_params,
            output::bytes(i.tensor_bytes),
            c.ctx(),
            i.ctx_train,
            i.device
        ),
        "parameters" => settings::show(&c.config, c.ctx()),
        "system" => format!("{}\n", c.config.chat.system.as_deref().unwrap_or("(no system prompt)")),
        "template" => format!("{}\n", c.template.source()),
        "messages" => serde_json::to_string_pretty(&c.messages)? + "\n",
        _ => bail!("unknown: /show {what}; /show lists what there is"),
    };
    Ok(output::print(&text)?)
}
