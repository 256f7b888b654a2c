//! A kernel package's modules: where they are, what they need, in which order they are loaded.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The modules of one release.
#[derive(Debug)]
pub struct ModuleTree {
    /// Each with the files it needs, the one to load first last: as `modules.dep` has it.
    lines: Vec<(Module, Vec<PathBuf>)>,
    built_in: HashSet<String>,
}

/// A module's file, and its name with underscores.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Module {
    pub name: String,
    pub path: PathBuf,
}

impl Module {
    fn at(path: PathBuf) -> Self {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let name = file.split_once(".ko").map_or(&*file, |(name, _)| name).replace('-', "_");
        Self { name, path }
    }
}

impl ModuleTree {
    /// Of this directory, `/lib/modules/RELEASE`.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let dependencies = fs::read_to_string(dir.join("modules.dep"))?;
        let built_in = fs::read_to_string(dir.join("modules.builtin"))?;
        Ok(Self::parse(dir, &dependencies, &built_in))
    }

    fn parse(dir: &Path, dependencies: &str, built_in: &str) -> Self {
        let line = |line: &str| {
            let (module, needs) = line.split_once(':')?;
            Some((Module::at(dir.join(module)), needs.split_whitespace().map(|need| dir.join(need)).collect()))
        };
        let built_in = built_in.lines().map(|line| Module::at(line.into()).name).collect();
        Self { lines: dependencies.lines().filter_map(line).collect(), built_in }
    }

    /// `wanted` where they are modules, then `needed`, each after all that it needs.
    ///
    /// # Errors
    /// A needed one that is neither a module nor built in.
    pub fn load_order(&self, needed: &[&str], wanted: &[&str]) -> io::Result<Vec<Module>> {
        let mut order: Vec<Module> = Vec::new();
        let names = wanted.iter().map(|name| (name, true)).chain(needed.iter().map(|name| (name, false)));
        for (&name, optional) in names {
            let Some((module, needs)) = self.lines.iter().find(|(module, _)| module.name == name) else {
                if optional || self.built_in.contains(name) {
                    continue;
                }
                return Err(io::Error::new(io::ErrorKind::NotFound, format!("the kernel has no module {name}")));
            };
            for next in needs.iter().rev().cloned().map(Module::at).chain([module.clone()]) {
                if !order.contains(&next) {
                    order.push(next);
                }
            }
        }
        Ok(order)
    }
}
