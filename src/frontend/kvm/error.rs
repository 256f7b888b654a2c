//! What can go wrong with a KVM machine, and what can be wrong with an encoded one: two small enums, whose messages say
//! what to do.

use std::io;

use super::call::KvmCall;
use super::count::VcpuCount;
use super::msr::MsrIndex;
use super::ram::SlotNumber;
use super::vcpu::VcpuIndex;
use crate::page::ByteSize;

/// A capture, a restore or the building of a machine failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// The host refused a call on the machine as a whole.
    #[error("{call} failed: {source}; {}", call.advice())]
    Machine {
        /// Which call.
        call: KvmCall,
        /// What the host said.
        source: io::Error,
    },
    /// The engine's RAM could not be handed over.
    #[error("guest RAM could not be registered: {0}")]
    Ram(#[source] crate::error::SpaceError),
    /// The host refused a call on one vCPU.
    #[error("{call} failed on {vcpu}: {source}; {}", call.advice())]
    Vcpu {
        /// Which call.
        call: KvmCall,
        /// On which vCPU.
        vcpu: VcpuIndex,
        /// What the host said.
        source: io::Error,
    },
    /// The host took no value, or not this one, for a model-specific register.
    #[error(
        "KVM_SET_MSRS stopped on {vcpu} at {msr}: the host refused the captured value {captured:#x}{}; restore on a \
         host and with a CPUID that have this register",
        match present { Some(value) => format!(" and keeps {value:#x}"), None => " and cannot read the register either".to_owned() }
    )]
    MsrRefused {
        /// On which vCPU.
        vcpu: VcpuIndex,
        /// Which register.
        msr: MsrIndex,
        /// The value that was captured.
        captured: u64,
        /// What the register holds on the new vCPU, if it can be read.
        present: Option<u64>,
    },
    /// The number of vCPUs handed over is not the machine's.
    #[error("the machine has {expected}, but {given} were handed over; hand over all of them, in the same order")]
    VcpuCount {
        /// How many the plan or the state has.
        expected: VcpuCount,
        /// How many were given.
        given: VcpuCount,
    },
    /// The captured vector state does not fit this host's.
    #[error(
        "the captured vector state takes {captured}, this host's at most {host}; restore on a host with the same processor features"
    )]
    XsaveSize {
        /// Size that was captured.
        captured: ByteSize,
        /// The most that this host takes.
        host: ByteSize,
    },
    /// A slot holds memory of something else.
    #[error("{slot} does not lie in the RAM that was named: name the RAM that the machine was built over")]
    ForeignSlot {
        /// Its number.
        slot: SlotNumber,
    },
    /// A slot would wrap around the guest's address space.
    #[error("{slot} would reach past the end of the guest-physical address space; lower its address")]
    SlotRange {
        /// Its number.
        slot: SlotNumber,
    },
}

impl KvmError {
    /// The call that failed, where one did.
    pub fn call(&self) -> Option<KvmCall> {
        match self {
            Self::Machine { call, .. } | Self::Vcpu { call, .. } => Some(*call),
            Self::MsrRefused { .. } => Some(KvmCall::SetMsrs),
            _ => None,
        }
    }
}

/// Bytes that are not an encoded machine state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The first bytes are not those of the format.
    #[error("not an encoded KVM machine: the magic bytes are missing; hand over the bytes that `to_bytes` gave")]
    Magic,
    /// The format has another version.
    #[error("format version {found}, this library reads {supported}; use the release that wrote it")]
    Version {
        /// The version in the header.
        found: u32,
        /// The version this library reads.
        supported: u32,
    },
    /// There are fewer or more bytes than the header says.
    #[error("{given} given where the header says {declared}; the encoding was cut short or something was appended")]
    Length {
        /// The length in the header.
        declared: ByteSize,
        /// The number of bytes given.
        given: ByteSize,
    },
    /// The checksum does not match.
    #[error(
        "checksum {found:#010x}, expected {expected:#010x}; the encoding is damaged: read it again from its source"
    )]
    Checksum {
        /// The checksum of the bytes given.
        found: u32,
        /// The checksum in the header.
        expected: u32,
    },
    /// A field says more than the format allows.
    #[error("{field} is {found}, the limit is {limit}; the encoding is not from `to_bytes`")]
    Limit {
        /// Which field.
        field: &'static str,
        /// What it says.
        found: u64,
        /// The most it may say.
        limit: u64,
    },
    /// A field says less than the format allows.
    #[error("{field} is {found}, and at least {least} in every encoding from `to_bytes`")]
    TooSmall {
        /// Which field.
        field: &'static str,
        /// What it says.
        found: u64,
        /// The least it may say.
        least: u64,
    },
    /// The bytes end inside a field although the length matches.
    #[error("the encoding ends inside {field}; it is not from `to_bytes`")]
    Truncated {
        /// Which field.
        field: &'static str,
    },
    /// Bytes are left after the last field.
    #[error("{excess} follow the last field; the encoding is not from `to_bytes`")]
    Excess {
        /// How many.
        excess: ByteSize,
    },
}
