//! One connection to etcd: a lease, everything this host has under it, and a watch on everything.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, Identity, PutOptions,
    TlsOptions, Txn, TxnOp, WatchOptions, WatchResponse,
};
use tokio::sync::mpsc::UnboundedReceiver;

use super::super::{Claim, Home, HostName, Hosts};
use super::keys::{Key, PREFIX, PREFIX_END};
use super::mirror::Mirror;
use super::{Order, Place};

/// An etcd that does not answer for so long is looked for anew.
const ANSWER: Duration = Duration::from_secs(3);
/// Entries per request.
const BATCH: usize = 100;
const PAGE: i64 = 2000;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    #[error("{0}")]
    Etcd(#[from] etcd_client::Error),
    #[error("no answer within {ANSWER:?}")]
    Silent,
    #[error("{0}")]
    Ended(String),
    #[error("cannot read {file}: {why}")]
    File { file: String, why: std::io::Error },
}

pub struct Member {
    place: Place,
    own: HostName,
    addr: SocketAddr,
    mirror: Mirror,
    /// What this host has. Firm until etcd knows.
    wanted: BTreeMap<Home, Claim>,
    /// The session before this one ended by itself, and that was said.
    reported: bool,
    /// The current session got as far as being part of the directory.
    joined: bool,
}

/// Waits for etcd's answer, but not for ever.
async fn answer<T>(asked: impl Future<Output = Result<T, etcd_client::Error>>) -> Result<T, Lost> {
    Ok(tokio::time::timeout(ANSWER, asked).await.map_err(|_| Lost::Silent)??)
}

impl Member {
    pub fn new(place: Place, addr: SocketAddr, hosts: Arc<Hosts>) -> Self {
        let own = HostName::from(hosts.own());
        let (mirror, wanted) = (Mirror::new(hosts), BTreeMap::new());
        Member { place, own, addr, mirror, wanted, reported: false, joined: false }
    }

    /// Remembers an order; it is carried out by the session, or by the next one.
    pub fn note(&mut self, order: &Order) {
        match order {
            Order::Publish(home, claim) => _ = self.wanted.insert(home.clone(), *claim),
            Order::Withdraw(home) => _ = self.wanted.remove(home),
            _ => {}
        }
    }

    /// One line per outage. True if the session had been part of the directory.
    pub fn report(&mut self, lost: &Lost) -> bool {
        let urls = self.place.urls.join(",");
        if !std::mem::replace(&mut self.reported, true) {
            tracing::warn!("etcd at {urls} is lost: {lost}; what was known of other hosts still holds");
        }
        std::mem::replace(&mut self.joined, false)
    }

    /// Takes part in the directory until told to stop, or until etcd is lost.
    pub async fn session(&mut self, orders: &mut UnboundedReceiver<Order>) -> Result<(), Lost> {
        let options = self.options()?;
        let mut client = answer(Client::connect(&self.place.urls, Some(options))).await?;
        let ttl = self.place.ttl.as_secs().max(1) as i64;
        let lease = answer(client.lease_grant(ttl, None)).await?.id();
        let (mut keeper, mut kept) = answer(client.lease_keep_alive(lease)).await?;
        let (content, revision) = read_all(&mut client).await?;
        self.mirror.snapshot(&content);
        let watched = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
        let mut watch = answer(client.watch(PREFIX, Some(watched))).await?;
        self.register(&mut client, lease, &content).await?;
        self.say_joined();
        let mut beat = tokio::time::interval(self.place.ttl / 3);
        let mut heard = Instant::now();
        let settled = tokio::time::sleep(self.place.ttl);
        tokio::pin!(settled);
        let mut in_doubt = true;
        let mut todo = vec![];
        loop {
            tokio::select! {
                _ = orders.recv_many(&mut todo, BATCH) => {
                    match todo.iter().position(Order::ends) {
                        #[cfg(test)]
                        Some(at) if matches!(todo[at], Order::Die) => return Ok(()),
                        Some(_) => {
                            // Everything of this host goes with it; if not now, when the lease ends.
                            let _ = answer(client.lease_revoke(lease)).await;
                            return Ok(());
                        }
                        None => self.carry_out(&mut client, lease, std::mem::take(&mut todo)).await?,
                    }
                }
                news = watch.message() => self.hear(news?)?,
                alive = kept.message() => match alive? {
                    Some(alive) if alive.ttl() > 0 => heard = Instant::now(),
                    _ => return Err(Lost::Ended("the lease has ended".into())),
                },
                _ = beat.tick() => {
                    if heard.elapsed() > self.place.ttl {
                        return Err(Lost::Silent);
                    }
                    answer(keeper.keep_alive()).await?;
                }
                () = &mut settled, if in_doubt => {
                    self.mirror.settle();
                    in_doubt = false;
                }
            }
        }
    }

    fn options(&self) -> Result<ConnectOptions, Lost> {
        let read = |path: &std::path::Path| {
            std::fs::read(path).map_err(|why| Lost::File { file: path.display().to_string(), why })
        };
        let mut options = ConnectOptions::new()
            .with_connect_timeout(ANSWER)
            .with_keep_alive(ANSWER, ANSWER)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if let Some([ca, cert, key]) = &self.place.tls {
            let identity = Identity::from_pem(read(cert)?, read(key)?);
            let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read(ca)?)).identity(identity);
            options = options.with_tls(tls);
        }
        Ok(options)
    }

    fn say_joined(&mut self) {
        self.joined = true;
        self.reported = false;
        let (urls, count) = (self.place.urls.join(","), self.wanted.len());
        tracing::info!("host {} is in the directory at {urls}, with {count} addresses", self.own);
    }

    /// Says everything that this host has, and takes back what it no longer has.
    async fn register(
        &mut self,
        client: &mut Client,
        lease: i64,
        content: &BTreeMap<Key, String>,
    ) -> Result<(), Lost> {
        let host = Key::Host(self.own.clone());
        let addr = self.addr.to_string();
        if let Some(other) = content.get(&host).filter(|other| **other != addr) {
            tracing::warn!("host {} was at {other} and is at {addr} now: is the name used twice?", self.own);
        }
        let under = Some(PutOptions::new().with_lease(lease));
        answer(client.put(host.text(), addr, under)).await?;
        let ours = content.iter().filter(|(_, at)| **at == *self.own);
        let stale = ours.filter(|(key, _)| matches!(key, Key::Home(home) if !self.wanted.contains_key(home)));
        let mut todo: Vec<TxnOp> = stale.map(|(key, _)| self.removal(key)).collect();
        todo.extend(self.wanted.iter().map(|(home, claim)| self.entry(home, *claim, lease)));
        for some in todo.chunks(BATCH) {
            answer(client.txn(Txn::new().and_then(some))).await?;
        }
        self.wanted.values_mut().for_each(|claim| *claim = Claim::Modest);
        Ok(())
    }

    /// An entry of this host. A modest claim takes nothing from another.
    fn entry(&self, home: &Home, claim: Claim, lease: i64) -> TxnOp {
        let key = Key::Home(home.clone()).text();
        let put = TxnOp::put(key.clone(), &*self.own, Some(PutOptions::new().with_lease(lease)));
        if claim == Claim::Firm {
            return put;
        }
        let absent = Compare::version(key.clone(), CompareOp::Equal, 0);
        let ours = Compare::value(key, CompareOp::Equal, &*self.own);
        let if_ours = TxnOp::txn(Txn::new().when([ours]).and_then([put.clone()]));
        TxnOp::txn(Txn::new().when([absent]).and_then([put]).or_else([if_ours]))
    }

    fn removal(&self, key: &Key) -> TxnOp {
        let key = key.text();
        let ours = Compare::value(key.clone(), CompareOp::Equal, &*self.own);
        TxnOp::txn(Txn::new().when([ours]).and_then([TxnOp::delete(key, None)]))
    }

    /// Does as the orders say: the last one about each address.
    async fn carry_out(&mut self, client: &mut Client, lease: i64, orders: Vec<Order>) -> Result<(), Lost> {
        orders.iter().for_each(|order| self.note(order));
        let mut ops = BTreeMap::new();
        for order in &orders {
            match order {
                Order::Publish(home, claim) => ops.insert(home, self.entry(home, *claim, lease)),
                Order::Withdraw(home) => ops.insert(home, self.removal(&Key::Home(home.clone()))),
                _ => None,
            };
        }
        let ops: Vec<TxnOp> = ops.into_values().collect();
        answer(client.txn(Txn::new().and_then(ops))).await?;
        for order in orders {
            if let Order::Publish(home, _) = order
                && let Some(claim) = self.wanted.get_mut(&home)
            {
                *claim = Claim::Modest;
            }
        }
        Ok(())
    }

    /// Changes that somebody made, this host included.
    fn hear(&mut self, news: Option<WatchResponse>) -> Result<(), Lost> {
        let news = news.ok_or_else(|| Lost::Ended("the watch has ended".into()))?;
        if news.canceled() {
            return Err(Lost::Ended(format!("the watch is over: {}", news.cancel_reason())));
        }
        for event in news.events() {
            let Some(kv) = event.kv() else { continue };
            let Some(key) = Key::parse(kv.key()) else { continue };
            match (event.event_type(), kv.value_str()) {
                (EventType::Put, Ok(value)) => {
                    self.notice_loss(&key, value);
                    self.mirror.put(&key, value);
                }
                (EventType::Put, Err(_)) => {}
                (EventType::Delete, _) => self.mirror.delete(&key),
            }
        }
        Ok(())
    }

    /// Another host has what was ours: it moved there, and we do not take it back.
    fn notice_loss(&mut self, key: &Key, at: &str) {
        let Key::Home(home) = key else { return };
        if at != &*self.own && self.wanted.remove(home).is_some() {
            tracing::warn!(
                "{} of tenant {} is on host {at} now: other hosts no longer find this host's",
                home.ip,
                home.tenant
            );
        }
    }
}

/// The whole directory, as of one revision.
async fn read_all(client: &mut Client) -> Result<(BTreeMap<Key, String>, i64), Lost> {
    let mut content = BTreeMap::new();
    let (mut from, mut revision) = (PREFIX.as_bytes().to_vec(), 0);
    loop {
        let options = GetOptions::new().with_range(PREFIX_END).with_limit(PAGE).with_revision(revision);
        let page = answer(client.get(from, Some(options))).await?;
        if revision == 0 {
            revision = page.header().map_or(0, |header| header.revision());
        }
        for kv in page.kvs() {
            if let (Some(key), Ok(value)) = (Key::parse(kv.key()), kv.value_str()) {
                content.insert(key, value.to_owned());
            }
        }
        match page.kvs().last() {
            Some(last) if page.more() => from = [last.key(), &[0]].concat(),
            _ => return Ok((content, revision)),
        }
    }
}
