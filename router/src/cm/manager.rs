//! The table of clients, channels and ids, and the way from an input to its rules.
//!
//! Owns ownership: no rule sees an id or a channel that is not its caller's. What the requests mean is in
//! `address` (bind, listen, resolve), `connect` (the handshake) and `ends` (every way a connection is over).

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Instant;

use freeflow_core::ctl::cm::{CmDropped, CmNext, cm_event, cm_space};
use rustix::io::Errno;

use super::id::{Id, State};
use super::ports::Ports;
use super::{Answer, Call, Directory, Home, Input, Output};

/// Ids one container may have. Passive ids count.
pub const MAX_IDS: usize = 65_536;
/// Channels one container may have; each costs the router a descriptor.
pub const MAX_CHANNELS: usize = 4_096;
/// Events that may wait in a channel before its owner's own requests are refused.
pub const MAX_WAITING: usize = 8_192;

pub type Result<T> = std::result::Result<T, Errno>;

#[derive(Debug)]
struct Client {
    home: Home,
    ids: BTreeSet<u32>,
    channels: BTreeSet<u32>,
}

#[derive(Debug)]
struct Channel {
    client: u32,
    events: VecDeque<CmNext>,
}

/// The connection manager's whole state.
pub struct Manager {
    pub(super) directory: Box<dyn Directory>,
    pub(super) ports: Ports,
    clients: HashMap<u32, Client>,
    channels: HashMap<u32, Channel>,
    ids: HashMap<u32, Id>,
    timers: BTreeSet<(Instant, u32)>,
    last_number: u32,
    pub(super) output: Output,
}

impl std::fmt::Debug for Manager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Manager").field("clients", &self.clients.len()).field("ids", &self.ids.len()).finish()
    }
}

impl Manager {
    /// `seed` decides which free ports come first.
    pub fn new(directory: Box<dyn Directory>, seed: u16) -> Self {
        Manager {
            directory,
            ports: Ports::new(seed),
            clients: HashMap::new(),
            channels: HashMap::new(),
            ids: HashMap::new(),
            timers: BTreeSet::new(),
            last_number: 0,
            output: Output::default(),
        }
    }

    /// Takes one input; nothing else changes the manager.
    pub fn process(&mut self, input: Input, now: Instant) -> Output {
        match input {
            Input::Join { client, home } => {
                let new = Client { home, ids: BTreeSet::new(), channels: BTreeSet::new() };
                self.clients.insert(client, new);
            }
            Input::Leave { client } => self.leave(client, now),
            Input::Call { client, call } => {
                let answer = self.call(client, &call, now);
                self.output.answer = Some(answer);
            }
            Input::Tick => self.tick(now),
            Input::Far { host, bytes } => self.far(&host, &bytes, now),
            Input::HostGone { host } => self.host_gone(&host),
        }
        std::mem::take(&mut self.output)
    }

    /// When to call again with [`Input::Tick`].
    pub fn deadline(&self) -> Option<Instant> {
        self.timers.first().map(|(when, _)| *when)
    }

    /// Ports of a container that have a listener.
    pub fn ports(&self, home: &Home) -> Vec<u16> {
        self.ports.listening(home)
    }

    fn call(&mut self, client: u32, call: &Call, now: Instant) -> Result<Answer> {
        if !self.clients.contains_key(&client) {
            return Err(Errno::NOTCONN);
        }
        match call {
            Call::OpenChannel(_) => self.open_channel(client),
            Call::CloseChannel(r) => self.close_channel(client, r.channel, now),
            Call::Create(r) => self.create(client, r.channel, r.space),
            Call::Destroy(r) => {
                self.owned(client, r.id)?;
                self.destroy(r.id, now)
            }
            Call::Migrate(r) => self.migrate(client, r.id, r.channel),
            Call::Bind(r) => self.bind(client, r),
            Call::Listen(r) => self.listen(client, r.id, r.backlog),
            Call::ResolveAddr(r) => self.resolve_addr(client, r),
            Call::ResolveRoute(r) => self.resolve_route(client, r.id),
            Call::Connect(r) => self.connect(client, r, now),
            Call::Accept(r) => self.accept(client, r, now),
            Call::Establish(r) => self.establish(client, r.id, now),
            Call::Reject(r) => self.reject(client, r, now),
            Call::Disconnect(r) => self.disconnect(client, r.id, now),
            Call::Notify(r) => self.notify(client, r.id),
            Call::NextEvent(r) => self.next_event(client, r.channel),
            Call::Join(r) => self.join(client, r.id, &r.addr),
        }
    }

    /// What all processes of `client`'s container have of something.
    fn used(&self, client: u32, count: impl Fn(&Client) -> usize) -> usize {
        let Some(home) = self.clients.get(&client).map(|asker| &asker.home) else { return 0 };
        self.clients.values().filter(|other| other.home == *home).map(count).sum()
    }

    fn number(&mut self) -> u32 {
        loop {
            self.last_number = self.last_number.wrapping_add(1);
            let n = self.last_number;
            if n != 0 && !self.ids.contains_key(&n) && !self.channels.contains_key(&n) {
                return n;
            }
        }
    }

    // ---- channels

    fn open_channel(&mut self, client: u32) -> Result<Answer> {
        let number = self.number();
        if self.used(client, |owner| owner.channels.len()) >= MAX_CHANNELS {
            return Err(Errno::MFILE);
        }
        let owner = self.clients.get_mut(&client).ok_or(Errno::NOTCONN)?;
        owner.channels.insert(number);
        self.channels.insert(number, Channel { client, events: VecDeque::new() });
        Ok(Answer::Channel(number))
    }

    fn close_channel(&mut self, client: u32, channel: u32, now: Instant) -> Result<Answer> {
        self.owned_channel(client, channel)?;
        let ids: Vec<u32> =
            self.ids.iter().filter(|(_, id)| id.channel == channel).map(|(n, _)| *n).collect();
        for id in ids {
            // Destroying a listener takes its unfetched requests along: not every id is still there.
            if self.ids.contains_key(&id) {
                self.destroy(id, now)?;
            }
        }
        self.channels.remove(&channel);
        if let Some(owner) = self.clients.get_mut(&client) {
            owner.channels.remove(&channel);
        }
        self.output.closed.push(channel);
        Ok(Answer::Done)
    }

    pub(super) fn owned_channel(&self, client: u32, channel: u32) -> Result<()> {
        match self.channels.get(&channel) {
            Some(found) if found.client == client => Ok(()),
            _ => Err(Errno::NOENT),
        }
    }

    /// Refuses when the owner of `channel` does not fetch its events.
    pub(super) fn has_room(&self, channel: u32) -> Result<()> {
        match self.channels.get(&channel) {
            Some(found) if found.events.len() < MAX_WAITING => Ok(()),
            _ => Err(Errno::NOBUFS),
        }
    }

    fn next_event(&mut self, client: u32, channel: u32) -> Result<Answer> {
        self.owned_channel(client, channel)?;
        let found = self.channels.get_mut(&channel).ok_or(Errno::NOENT)?;
        let none = CmNext { kind: cm_event::NONE, ..Default::default() };
        let event = found.events.pop_front().unwrap_or(none);
        self.no_longer_waits(&event);
        Ok(Answer::Next { channel, event: Box::new(event) })
    }

    /// A request that left the queue makes room in its listener's backlog.
    fn no_longer_waits(&mut self, event: &CmNext) {
        if event.kind == cm_event::CONNECT_REQUEST
            && let Some(listener) = self.ids.get_mut(&event.listener)
        {
            listener.waiting -= 1;
        }
    }

    /// Queues an event about `id` on its channel.
    pub(super) fn post(&mut self, id: u32, event: CmNext) {
        let Some(found) = self.ids.get(&id) else { return };
        let filled = CmNext { id, local: found.local, remote: found.remote, ..event };
        let channel = found.channel;
        if let Some(queue) = self.channels.get_mut(&channel) {
            queue.events.push_back(filled);
            self.output.tickets.push(channel);
        }
    }

    // ---- ids

    fn create(&mut self, client: u32, channel: u32, space: u32) -> Result<Answer> {
        self.owned_channel(client, channel)?;
        if !cm_space::ALL.contains(&space) {
            return Err(Errno::PROTONOSUPPORT);
        }
        self.add(Id::new(client, channel, space)).map(Answer::Id)
    }

    /// Enters an id into the table, if its client may have one more.
    pub(super) fn add(&mut self, id: Id) -> Result<u32> {
        let number = self.number();
        if self.used(id.client, |owner| owner.ids.len()) >= MAX_IDS {
            return Err(Errno::NOMEM);
        }
        let owner = self.clients.get_mut(&id.client).ok_or(Errno::NOTCONN)?;
        owner.ids.insert(number);
        self.ids.insert(number, id);
        Ok(number)
    }

    /// The id, if it is `client`'s.
    pub(super) fn owned(&self, client: u32, id: u32) -> Result<&Id> {
        self.ids.get(&id).filter(|found| found.client == client).ok_or(Errno::NOENT)
    }

    pub(super) fn id(&self, id: u32) -> Option<&Id> {
        self.ids.get(&id)
    }

    pub(super) fn id_mut(&mut self, id: u32) -> Option<&mut Id> {
        self.ids.get_mut(&id)
    }

    pub(super) fn ids_with(&self, fits: impl Fn(&Id) -> bool) -> Vec<u32> {
        self.ids.iter().filter(|(_, id)| fits(id)).map(|(number, _)| *number).collect()
    }

    pub(super) fn home(&self, client: u32) -> Result<Home> {
        self.clients.get(&client).map(|found| found.home.clone()).ok_or(Errno::NOTCONN)
    }

    /// Moves an id to a new state; a deadline belongs to a state.
    pub(super) fn set(&mut self, id: u32, state: State, deadline: Option<Instant>) {
        let Some(found) = self.ids.get_mut(&id) else { return };
        if let Some(old) = found.deadline.take() {
            self.timers.remove(&(old, id));
        }
        found.state = state;
        found.deadline = deadline;
        if let Some(when) = deadline {
            self.timers.insert((when, id));
        }
    }

    fn migrate(&mut self, client: u32, id: u32, channel: u32) -> Result<Answer> {
        let old = self.owned(client, id)?.channel;
        self.owned_channel(client, channel)?;
        self.has_room(channel)?;
        // A listener takes the requests along that nobody has seen yet.
        let mut movers: BTreeSet<u32> = self.requests_of(old, id).collect();
        movers.insert(id);
        let moved = self.take_events(old, |event| movers.contains(&event.id));
        for number in movers {
            if let Some(found) = self.ids.get_mut(&number) {
                found.channel = channel;
            }
        }
        let count = moved.len();
        if let Some(queue) = self.channels.get_mut(&channel) {
            queue.events.extend(moved);
        }
        self.output.tickets.extend(std::iter::repeat_n(channel, count));
        Ok(Answer::Dropped { channel: old, dropped: CmDropped { events: count as u32 } })
    }

    /// Ids of the unfetched requests to a listener.
    fn requests_of(&self, channel: u32, listener: u32) -> impl Iterator<Item = u32> {
        let events = self.channels.get(&channel).into_iter().flat_map(|queue| &queue.events);
        events.filter(move |event| event.listener == listener).map(|event| event.id)
    }

    /// Takes the events that fit out of a channel's queue.
    pub(super) fn take_events(&mut self, channel: u32, fits: impl Fn(&CmNext) -> bool) -> Vec<CmNext> {
        let Some(queue) = self.channels.get_mut(&channel) else { return Vec::new() };
        let (taken, kept) = queue.events.drain(..).partition(|event| fits(event));
        queue.events = kept;
        Vec::from(taken)
    }

    /// Ends what the id does and forgets it.
    fn destroy(&mut self, id: u32, now: Instant) -> Result<Answer> {
        self.end(id, now);
        let Some(found) = self.ids.get(&id) else { return Err(Errno::NOENT) };
        let channel = found.channel;
        let requests: Vec<u32> = self.requests_of(channel, id).collect();
        let mut events = 0;
        for request in requests {
            self.end(request, now);
            events += self.forget(request);
        }
        events += self.forget(id);
        Ok(Answer::Dropped { channel, dropped: CmDropped { events: events as u32 } })
    }

    /// Removes an id that is over, and its events; says how many those were.
    fn forget(&mut self, id: u32) -> usize {
        self.set(id, State::Ended, None);
        let Some(old) = self.ids.remove(&id) else { return 0 };
        if let Some(owner) = self.clients.get_mut(&old.client) {
            owner.ids.remove(&id);
            if old.holds_port {
                self.ports.release(&owner.home, old.space, old.local.port, id);
            }
        }
        let events = self.take_events(old.channel, |event| event.id == id);
        events.iter().for_each(|event| self.no_longer_waits(event));
        events.len()
    }

    fn leave(&mut self, client: u32, now: Instant) {
        let Some(gone) = self.clients.get(&client) else { return };
        for channel in gone.channels.clone() {
            // Cannot fail: the channel is the client's own.
            let _ = self.close_channel(client, channel, now);
        }
        self.clients.remove(&client);
    }

    fn tick(&mut self, now: Instant) {
        while let Some((_, id)) = self.timers.first().copied().filter(|(when, _)| *when <= now) {
            self.expire(id, now);
        }
    }
}
