//! A table of objects that belong to clients.

use std::collections::HashMap;

use crate::refusal::{Refusal, Result};

/// Whose an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub client: u32,
    pub container: u32,
}

/// Objects by id. What another container owns does not exist for the asker.
#[derive(Debug)]
pub struct Table<T> {
    what: &'static str,
    rows: HashMap<u32, (Owner, T)>,
}

impl<T> Table<T> {
    pub fn new(what: &'static str) -> Self {
        Table { what, rows: HashMap::new() }
    }

    pub fn insert(&mut self, id: u32, owner: Owner, row: T) {
        let before = self.rows.insert(id, (owner, row));
        debug_assert!(before.is_none(), "{} {id} given out twice", self.what);
    }

    pub fn contains(&self, id: u32) -> bool {
        self.rows.contains_key(&id)
    }

    pub fn get(&self, id: u32) -> Option<(Owner, &T)> {
        self.rows.get(&id).map(|(owner, row)| (*owner, row))
    }

    pub fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        self.rows.get_mut(&id).map(|(_, row)| row)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, Owner, &T)> {
        self.rows.iter().map(|(id, (owner, row))| (*id, *owner, row))
    }

    /// The object, if `owner` is its owner.
    pub fn owned(&self, id: u32, owner: Owner) -> Result<&T> {
        match self.rows.get(&id) {
            Some((held, row)) if held.client == owner.client => Ok(row),
            Some((held, _)) if held.container == owner.container => {
                Err(Refusal::NotYours { what: self.what, id })
            }
            _ => Err(Refusal::NoSuch { what: self.what, id }),
        }
    }

    pub fn owned_mut(&mut self, id: u32, owner: Owner) -> Result<&mut T> {
        self.owned(id, owner)?;
        let what = self.what;
        self.get_mut(id).ok_or(Refusal::NoSuch { what, id })
    }

    pub fn remove(&mut self, id: u32) -> Option<T> {
        self.rows.remove(&id).map(|(_, row)| row)
    }

    /// Ids of everything a client owns.
    pub fn ids_of(&self, client: u32) -> Vec<u32> {
        self.rows.iter().filter(|(_, (owner, _))| owner.client == client).map(|(id, _)| *id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_touch_what() {
        let me = Owner { client: 1, container: 1 };
        let sibling = Owner { client: 2, container: 1 };
        let stranger = Owner { client: 3, container: 2 };
        let mut table = Table::new("pd");
        table.insert(9, me, 'x');
        assert_eq!(table.owned(9, me), Ok(&'x'));
        assert_eq!(table.owned(9, sibling), Err(Refusal::NotYours { what: "pd", id: 9 }));
        assert_eq!(table.owned(9, stranger), Err(Refusal::NoSuch { what: "pd", id: 9 }));
        assert_eq!(table.owned(8, me), Err(Refusal::NoSuch { what: "pd", id: 8 }));
        assert_eq!(table.ids_of(1), [9]);
        assert!(table.ids_of(2).is_empty());
    }
}
