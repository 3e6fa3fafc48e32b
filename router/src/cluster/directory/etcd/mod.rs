//! The directory in etcd: what each host has is under its lease, and every host watches what the others have.
//!
//! Owns one thread with a runtime of its own; nothing else in the router knows of either. Callers leave orders and never
//! wait. While etcd cannot be reached the table stays as it is, and when it is back this host's entries are made again:
//! etcd may have lost everything.

mod keys;
mod mirror;
mod session;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use self::session::Member;
use super::{Backend, Claim, Home, Hosts};

/// The longest pause between two attempts to reach etcd.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// What etcd is to be asked with.
#[derive(Debug, Clone)]
pub struct Place {
    pub urls: Vec<String>,
    /// With https: the CA that etcd's certificate must be signed by, and what it gets to see of this host.
    pub tls: Option<[PathBuf; 3]>,
    /// How long entries outlive a host that is gone.
    pub ttl: Duration,
}

#[derive(Debug)]
enum Order {
    Publish(Home, Claim),
    Withdraw(Home),
    Stop,
    /// Stop as a process does that is killed.
    #[cfg(test)]
    Die,
}

impl Order {
    /// Is it the last one?
    fn ends(&self) -> bool {
        !matches!(self, Order::Publish(..) | Order::Withdraw(..))
    }
}

/// This host's part in the directory.
#[derive(Debug)]
pub struct Etcd {
    orders: UnboundedSender<Order>,
    thread: Option<JoinHandle<()>>,
}

impl Etcd {
    /// Joins as the host that `hosts` is the table of, reached at `addr`. etcd need not be there yet.
    pub fn start(place: Place, addr: SocketAddr, hosts: Arc<Hosts>) -> std::io::Result<Self> {
        let (orders, received) = unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let member = Member::new(place, addr, hosts);
        let serve = move || runtime.block_on(serve(member, received));
        let thread = std::thread::Builder::new().name("directory".into()).spawn(serve)?;
        Ok(Etcd { orders, thread: Some(thread) })
    }

    #[cfg(test)]
    fn fall_silent(&self) {
        self.order(Order::Die);
    }

    fn order(&self, order: Order) {
        // The thread ends only after Stop.
        let _ = self.orders.send(order);
    }
}

impl Backend for Etcd {
    fn publish(&self, home: &Home, claim: Claim) {
        self.order(Order::Publish(home.clone(), claim));
    }

    fn withdraw(&self, home: &Home) {
        self.order(Order::Withdraw(home.clone()));
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.order(Order::Stop);
        // A panic in it was printed where it happened.
        self.thread.take().map(JoinHandle::join);
    }
}

/// One session after the other until told to stop.
async fn serve(mut member: Member, mut orders: UnboundedReceiver<Order>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let reached = match member.session(&mut orders).await {
            Ok(()) => return,
            Err(lost) => member.report(&lost),
        };
        pause = if reached { FIRST_PAUSE } else { LONGEST_PAUSE.min(pause * 2) };
        if !wait(&mut member, &mut orders, pause).await {
            return;
        }
    }
}

/// Notes orders for `pause`; false when one of them is to stop.
async fn wait(member: &mut Member, orders: &mut UnboundedReceiver<Order>, pause: Duration) -> bool {
    let end = tokio::time::sleep(pause);
    tokio::pin!(end);
    loop {
        tokio::select! {
            () = &mut end => return true,
            order = orders.recv() => match order {
                None => return false,
                Some(order) if order.ends() => return false,
                Some(order) => member.note(&order),
            },
        }
    }
}
