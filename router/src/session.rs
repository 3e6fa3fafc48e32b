//! One connection: hello, then requests in order until either side is gone.
//!
//! Owns the loop and the order of checks (header, descriptors, size, then meaning). What requests do is in `requests`.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use freeflow_core::ctl::{
    Hello, HelloReply, Incoming, Request, Resume, Socket, SocketError, VERSION, purpose,
};
use freeflow_core::verbs::Gid;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use zerocopy::IntoBytes;

use crate::directory::Tenant;
use crate::identity::Peer;
use crate::limiter::Limiter;
use crate::refusal::Refusal;
use crate::requests;
use crate::shared::Shared;
use crate::state::{Client, MrTable, Mrs, Owner, Resuming, State};

/// Kinds of the connection manager's requests.
pub const CM_KINDS: std::ops::RangeInclusive<u16> = 0x40..=0x7f;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    #[error("the process died")]
    Died,
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("the process has ended, or is in a pid namespace that the router does not see into")]
    Invisible,
    #[error("no identity: {0}")]
    Identity(Errno),
    #[error("hello refused: {0}")]
    Hello(Refusal),
}

/// A body and the descriptors that go with it.
#[derive(Debug)]
pub struct Reply {
    pub body: Vec<u8>,
    pub fds: Vec<Arc<OwnedFd>>,
}

/// A request that is not answered by a reply.
#[derive(Debug)]
pub enum Failure {
    /// The connection goes on.
    Refused(Refusal),
    /// It ends.
    Broken(SocketError),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Failure::Refused(refusal)
    }
}

/// A connection after its hello.
#[derive(Debug)]
pub struct Session {
    pub shared: Arc<Shared>,
    pub owner: Owner,
    pub purpose: u32,
    pub socket: Arc<Socket>,
    peer: Peer,
    /// Its container's name and tenant.
    home: (String, Tenant),
}

/// Serves a connection that was admitted, until it ends.
pub fn serve(shared: &Arc<Shared>, connection: u64, container: u32, socket: Arc<Socket>) {
    let _leave = Leave { shared, connection };
    let end = match greet(shared, container, socket) {
        Ok((session, kind, reply)) => {
            let _bury = Bury(&session);
            // Who has hung up by now was a client all the same.
            send(&session.socket, kind, &reply).map_or_else(End::from, |()| session.run())
        }
        Err(end) => end,
    };
    match end {
        End::Died | End::Socket(SocketError::Closed) => {
            tracing::debug!("connection {connection} of container {container} ended: {end}")
        }
        end => shared.log(container, || format!("connection ended: {end}")),
    }
}

/// Gives a connection's place back, also when its session panics.
struct Leave<'a> {
    shared: &'a Shared,
    connection: u64,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.shared.with(|state| state.dismiss(self.connection));
        self.shared.something_ended();
    }
}

/// Gives a client's objects back, also when its session panics.
struct Bury<'a>(&'a Session);

impl Drop for Bury<'_> {
    fn drop(&mut self) {
        let client = self.0.owner.client;
        crate::cm_hook::leave(&self.0.shared, client);
        self.0.shared.take_datagrams(client);
        self.0.shared.with(|state| state.bury(client));
        self.0.shared.links.get().into_iter().for_each(|links| links.leave(client));
    }
}

/// Waits for the next message, or the end.
fn next(socket: &Socket, peer: &Peer) -> Result<Incoming, End> {
    loop {
        let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(&peer.pidfd, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(e) => return Err(SocketError::System("poll", e).into()),
        }
        if !fds[1].revents().is_empty() {
            return Err(End::Died);
        }
        match socket.recv(RecvFlags::DONTWAIT) {
            Err(SocketError::System(_, Errno::AGAIN)) => continue,
            other => return Ok(other?),
        }
    }
}

/// The first request: who is it, which version, what for. With the answer, which is still to be sent.
fn greet(shared: &Arc<Shared>, container: u32, socket: Arc<Socket>) -> Result<(Session, u16, Reply), End> {
    let peer = Peer::of(&*socket).map_err(|errno| match errno {
        Errno::SRCH => End::Invisible,
        errno => End::Identity(errno),
    })?;
    let message = next(&socket, &peer)?;
    let kind = message.header.kind;
    let greeting = Greeting::read(message)?;
    let purpose = greeting.purpose;
    match join(shared, container, &socket, &peer, greeting) {
        Ok((owner, home, reply)) => {
            Ok((Session { shared: shared.clone(), owner, purpose, socket, peer, home }, kind, reply))
        }
        Err(refusal) => {
            // Whether it still hears it does not matter: the connection ends.
            let _ = socket.refuse(kind, refusal.errno());
            Err(End::Hello(refusal))
        }
    }
}

/// What a connection begins with: [`Hello`], or [`Resume`] and the client's MR table.
struct Greeting {
    versions: (u16, u16),
    purpose: u32,
    before: Option<(Resume, OwnedFd)>,
}

impl Greeting {
    fn read(mut message: Incoming) -> Result<Self, SocketError> {
        match message.header.kind {
            Hello::KIND => {
                let Hello { min_version, max_version, purpose } = message.request()?;
                Ok(Greeting { versions: (min_version, max_version), purpose, before: None })
            }
            Resume::KIND => {
                let resume: Resume = message.request()?;
                let before = message.fds.pop().map(|table| (resume, table));
                let versions = (resume.min_version, resume.max_version);
                Ok(Greeting { versions, purpose: purpose::VERBS, before })
            }
            _ => Err(SocketError::Malformed("the first message must be Hello or Resume")),
        }
    }

    fn check(&self) -> Result<(), Refusal> {
        let (min, max) = self.versions;
        if min > VERSION || max < VERSION {
            return Err(Refusal::Version { min, max });
        }
        if self.purpose != purpose::VERBS && self.purpose != purpose::CM {
            return Err(Refusal::Invalid("purpose of a connection"));
        }
        Ok(())
    }

    /// The table of the client's memory regions, and the descriptor it is to get.
    fn mr_table(&self) -> Result<(MrTable, Option<OwnedFd>), Refusal> {
        let failed = Refusal::system("table of memory regions");
        match &self.before {
            Some((_, table)) => MrTable::brought(table).map(|table| (table, None)).map_err(failed),
            None => MrTable::new().map(|(table, writable)| (table, Some(writable))).map_err(failed),
        }
    }
}

/// What numbers of clients are called where they are proven; objects' kinds are the protocol's.
const CLIENT: u32 = u32::MAX;

/// A client's id: the one it shows it had, or a new one.
fn client_id(
    shared: &Shared,
    state: &mut State,
    home: &(String, Tenant),
    before: Option<&Resume>,
) -> Result<u32, Refusal> {
    let Some(resume) = before else { return state.new_client_id() };
    let id = resume.client;
    if shared.proofs.tag((&home.0, &home.1), CLIENT, id, 0) != resume.proof {
        return Err(Refusal::Access("another process's client id"));
    }
    if state.clients.contains_key(&id) {
        return Err(Refusal::Busy { what: "client id", id, by: "connection" });
    }
    Ok(id)
}

/// Makes a client of a connection that said hello.
fn join(
    shared: &Arc<Shared>,
    container: u32,
    socket: &Arc<Socket>,
    peer: &Peer,
    greeting: Greeting,
) -> Result<(Owner, (String, Tenant), Reply), Refusal> {
    greeting.check()?;
    let (event, theirs) = Socket::pair().map_err(Refusal::system("event socket"))?;
    let theirs = theirs.as_fd().try_clone_to_owned();
    let theirs = theirs.map_err(|_| Refusal::System { what: "event socket", errno: Errno::MFILE })?;
    let mut fds = vec![Arc::new(theirs)];
    let (mut memory, mut mr_table) = (Err(Errno::PERM), None);
    if greeting.purpose == purpose::VERBS {
        let (table, writable) = greeting.mr_table()?;
        mr_table = Some(Arc::new(table));
        fds.extend(writable.map(Arc::new));
        memory = peer.open_memory().map(Arc::new);
    }
    if let (purpose::VERBS, Err(errno)) = (greeting.purpose, &memory) {
        let pid = peer.pid;
        shared.log(container, || {
            format!("the memory of process {pid} cannot be opened ({errno}): only the direct path will work for it")
        });
    }
    let before = greeting.before.as_ref().map(|(resume, _)| resume);
    let resuming = before.map_or(Resuming::No, |_| Resuming::Open { claimed: None });
    let (owner, vip, home) = shared.with(|state| {
        let found = state.containers.get(&container).filter(|c| !c.leaving);
        let found = found.ok_or(Refusal::NoSuch { what: "container", id: container })?;
        let (vip, home) = (found.vip, (found.name.clone(), found.tenant.clone()));
        let id = client_id(shared, state, &home, before)?;
        let client = Client {
            id,
            container,
            pid: peer.pid,
            rpc: socket.clone(),
            event: Arc::new(event),
            memory,
            mr_table,
            mrs: Mrs::default(),
            cut_off: false,
            given: Default::default(),
            met: Default::default(),
            key_failures: Limiter::new(256, 32),
            key_failures_total: 0,
            resuming,
        };
        let owner = client.owner();
        state.clients.insert(id, client);
        Ok::<_, Refusal>((owner, vip, home))
    })?;
    if resuming != Resuming::No {
        Shared::await_peers(shared);
    }
    let reply = HelloReply {
        version: VERSION,
        _pad: 0,
        client: owner.client,
        vip: Gid::of(vip).0,
        boot: shared.boot,
        limits: requests::limits(&shared.settings),
        proof: shared.proofs.tag((&home.0, &home.1), CLIENT, owner.client, 0),
    };
    Ok((owner, home, Reply { body: reply.as_bytes().to_vec(), fds }))
}

fn send(socket: &Socket, kind: u16, reply: &Reply) -> Result<(), SocketError> {
    let fds: Vec<_> = reply.fds.iter().map(|fd| fd.as_fd()).collect();
    // Without waiting: who does not read its replies has no more room for one.
    socket.send(kind, 0, &reply.body, &fds, SendFlags::DONTWAIT)
}

impl Session {
    /// What shows a later router that this client had `number`.
    pub fn proof(&self, kind: u32, number: u32) -> u64 {
        self.shared.proofs.tag((&self.home.0, &self.home.1), kind, self.owner.client, number)
    }

    fn run(&self) -> End {
        if self.purpose == purpose::CM {
            crate::cm_hook::join(&self.shared, self.owner);
        }
        loop {
            let step = next(&self.socket, &self.peer).and_then(|message| Ok(self.answer(message)?));
            if let Err(end) = step {
                return end;
            }
        }
    }

    fn answer(&self, message: Incoming) -> Result<(), SocketError> {
        let kind = message.header.kind;
        if CM_KINDS.contains(&kind) && self.purpose == purpose::CM {
            if crate::cm_hook::handle(self, &message)? {
                return Ok(());
            }
            return self.refuse(kind, "connection manager request", &Refusal::Unsupported("request"));
        }
        let Some(entry) = requests::find(kind).filter(|_| self.purpose == purpose::VERBS) else {
            return self.refuse(kind, "unknown request", &Refusal::Unsupported("request"));
        };
        match (entry.run)(self, message) {
            Ok(reply) => send(&self.socket, kind, &reply),
            Err(Failure::Refused(refusal)) => self.refuse(kind, entry.name, &refusal),
            Err(Failure::Broken(error)) => Err(error),
        }
    }

    fn refuse(&self, kind: u16, request: &str, refusal: &Refusal) -> Result<(), SocketError> {
        let Owner { client, container } = self.owner;
        let pid = self.peer.pid;
        match refusal {
            Refusal::Quota(_) | Refusal::TooOften(_) => {
                self.shared.log(container, || format!("{request} of process {pid} refused: {refusal}"))
            }
            _ => tracing::debug!("client {client} (pid {pid}): {request} refused: {refusal}"),
        }
        self.socket.send(kind, refusal.errno().raw_os_error(), &[], &[], SendFlags::DONTWAIT)
    }
}
