//! Things that a model counts while anybody holds them: the counterpart of the engine's accounting.

use std::cell::Cell;
use std::rc::Rc;

/// How many of one kind are alive.
#[derive(Clone, Default)]
pub struct Counter(Rc<Cell<u64>>);

/// One counted thing. Share it in an `Rc` to share the page, image or fork point it stands for.
pub struct Held(Counter);

impl Counter {
    pub fn get(&self) -> u64 {
        self.0.get()
    }

    pub fn hold(&self) -> Held {
        self.0.set(self.0.get() + 1);
        Held(self.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.0.set(self.0.get() - 1);
    }
}

/// One cut's place in its family: who descends from whom, and how far.
pub struct Line {
    pub family: u64,
    pub depth: u32,
    parent: Option<Rc<Line>>,
}

impl Line {
    pub fn root(family: u64) -> Rc<Self> {
        Rc::new(Self { family, depth: 0, parent: None })
    }

    pub fn child(self: &Rc<Self>) -> Rc<Self> {
        Rc::new(Self { family: self.family, depth: self.depth + 1, parent: Some(self.clone()) })
    }

    /// Whether `ancestor` is a proper ancestor of this one.
    pub fn comes_from(&self, ancestor: &Rc<Self>) -> bool {
        let mut next = self.parent.as_ref();
        while let Some(line) = next {
            if Rc::ptr_eq(line, ancestor) {
                return true;
            }
            next = line.parent.as_ref();
        }
        false
    }
}
