//! Certificates of a small cluster: one authority, one certificate per host.
//!
//! Owns what such certificates look like. A site with an authority of its own needs none of this: a router asks for an
//! end-entity certificate with its host's name as a DNS name, good for server and client.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// Clocks of hosts differ.
const SKEW: Duration = Duration::from_secs(3600);
const NAME: &str = "FreeFlow cluster CA";

/// A certificate and its key, both PEM.
#[derive(Debug, Clone)]
pub struct Pair {
    pub cert: String,
    pub key: String,
}

/// What signs hosts' certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

fn days(days: u32) -> Duration {
    Duration::from_secs(u64::from(days) * 86_400)
}

fn valid(params: &mut CertificateParams, from: SystemTime, lasting: Duration) {
    params.not_before = (from - SKEW).into();
    params.not_after = (from + lasting).into();
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl Authority {
    /// A new authority, with its certificate.
    pub fn new(lasting_days: u32) -> Result<(Self, Pair), rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = authority_params();
        valid(&mut params, SystemTime::now(), days(lasting_days));
        let pair = Pair { cert: params.self_signed(&key)?.pem(), key: key.serialize_pem() };
        Ok((Authority { issuer: Issuer::new(params, key) }, pair))
    }

    /// The authority of an earlier [`Authority::new`], from its key: its name is always the same.
    pub fn again(key_pem: &str) -> Result<Self, rcgen::Error> {
        Ok(Authority { issuer: Issuer::new(authority_params(), KeyPair::from_pem(key_pem)?) })
    }

    /// A certificate for the router of `host`.
    pub fn host(&self, host: &str, lasting_days: u32) -> Result<Pair, rcgen::Error> {
        self.host_from(host, SystemTime::now(), days(lasting_days))
    }

    pub(crate) fn host_from(
        &self,
        host: &str,
        from: SystemTime,
        lasting: Duration,
    ) -> Result<Pair, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new([host.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, host);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        valid(&mut params, from, lasting);
        Ok(Pair { cert: params.signed_by(&key, &self.issuer)?.pem(), key: key.serialize_pem() })
    }
}
