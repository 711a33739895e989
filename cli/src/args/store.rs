//! Arguments of the commands on stored models (create, list, show, rm, cp) and on a running server (ps, stop).

use crate::cmd::remote::{self, Server};
use crate::cmd::store::{Config, Part};
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;

/// Give a model a name, with parameters, a system prompt, a template of its own
#[derive(Args)]
#[command(after_help = "Example of a Modelfile:\n  \
    FROM ./model-q4.gguf\n  \
    PARAMETER temperature 0.6\n  \
    PARAMETER kv sinks:4+window:4096\n  \
    SYSTEM \"\"\"You answer briefly.\"\"\"\n\n\
    Instructions are Ollama's: FROM (a GGUF file or a model's name), PARAMETER, SYSTEM, MESSAGE, LICENSE, and TEMPLATE, in\n\
    Jinja. The file that FROM names is referred to, not copied: it must stay where it is. Models are kept in\n\
    $RSINFER_MODELS, or in rsinfer/models in the user's data folder.")]
pub struct CreateArgs {
    /// The model's name, [NAMESPACE/]MODEL[:TAG]
    name: String,
    /// The Modelfile
    #[arg(short, long, value_name = "FILE", default_value = "Modelfile")]
    file: PathBuf,
}

/// List the models that have a name: rsinfer's, Ollama's, and demo
#[derive(Args)]
pub struct ListArgs {}

/// Show what is known of a model
#[derive(Args)]
#[command(group = clap::ArgGroup::new("part"))]
pub struct ShowArgs {
    /// A model's name, a GGUF file, or `demo`
    model: String,
    /// The Modelfile that makes it
    #[arg(long, group = "part")]
    modelfile: bool,
    /// Its parameters
    #[arg(long, group = "part")]
    parameters: bool,
    /// Its chat template
    #[arg(long, group = "part")]
    template: bool,
    /// Its system prompt
    #[arg(long, group = "part")]
    system: bool,
    /// Its licence
    #[arg(long, group = "part")]
    license: bool,
    /// All metadata, too
    #[arg(short, long)]
    verbose: bool,
}

/// Take models' names away; the files that they refer to stay
#[derive(Args)]
pub struct RmArgs {
    /// Names
    #[arg(required = true)]
    models: Vec<String>,
}

/// Give a model a second name
#[derive(Args)]
pub struct CpArgs {
    /// A model's name
    source: String,
    /// Its new name
    destination: String,
}

/// Where the server is.
#[derive(Args)]
pub struct ServerArgs {
    /// Address of the running server
    #[arg(long, env = "OLLAMA_HOST", default_value = "127.0.0.1:11434", value_name = "HOST:PORT")]
    host: String,
}

/// List the models that a running server has loaded
#[derive(Args)]
pub struct PsArgs {
    #[command(flatten)]
    server: ServerArgs,
}

/// Have a running server unload a model
#[derive(Args)]
pub struct StopArgs {
    /// The model
    model: String,
    #[command(flatten)]
    server: ServerArgs,
}

impl CreateArgs {
    pub fn resolve(self) -> Result<Config> {
        let text = crate::text::read_file(&self.file)?;
        let folder = self.file.parent().map(Into::into).unwrap_or_default();
        Ok(Config::Create { name: self.name, file: self.file.display().to_string(), text, folder })
    }
}

impl ListArgs {
    pub fn resolve(self) -> Config {
        Config::List
    }
}

impl ShowArgs {
    pub fn resolve(self) -> Config {
        let parts = [
            (self.modelfile, Part::Modelfile),
            (self.parameters, Part::Parameters),
            (self.template, Part::Template),
            (self.system, Part::System),
            (self.license, Part::License),
        ];
        let part = parts.into_iter().find(|(wanted, _)| *wanted).map(|(_, part)| part);
        Config::Show { model: self.model, part, verbose: self.verbose }
    }
}

impl RmArgs {
    pub fn resolve(self) -> Config {
        Config::Remove { models: self.models }
    }
}

impl CpArgs {
    pub fn resolve(self) -> Config {
        Config::Copy { source: self.source, destination: self.destination }
    }
}

impl PsArgs {
    pub fn resolve(self) -> remote::Config {
        remote::Config { server: Server::at(&self.server.host), action: remote::Action::List }
    }
}

impl StopArgs {
    pub fn resolve(self) -> remote::Config {
        remote::Config { server: Server::at(&self.server.host), action: remote::Action::Stop(self.model) }
    }
}
