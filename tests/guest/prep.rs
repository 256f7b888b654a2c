//! A clone is customized before anyone can reach it, or it is destroyed.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use offshoot::frontend::qemu::*;

use crate::boot::{Agent, Booted, LONG, YEAR_2001, until};

/// Seconds since 1970, here and now.
fn now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64()
}

/// The guest's wall clock.
fn wall(said: &str) -> f64 {
    said.split(' ').next().unwrap().parse().unwrap()
}

/// MAC, address and carrier of the guest's interface.
fn interface(said: &str) -> (String, String, String) {
    let mut words = said.split(' ').map(str::to_owned);
    (words.next().unwrap(), words.next().unwrap(), words.next().unwrap())
}

#[test]
fn clones_are_themselves_before_their_cables_are_in() {
    let Some(booted) = Booted::shared() else { return };
    let mut seen = HashSet::new();
    let clones: Vec<_> = (0..2)
        .map(|number| {
            let address = format!("10.9.0.{}", number + 1);
            let spec = QemuClone { link: LinkState::Up, ..QemuClone::default() };
            let mut began = 0.0;
            let vm = booted.point.spawn_prepared(spec, LONG, |prep| {
                prep.reseeded()?;
                // Until now the clone is its parent, to whoever could ask it; its clock stands in the parent's time.
                let mac = prep.identity().mac.to_string();
                let (had, _, _) = interface(&prep.ask(&["net", "eth0"])?);
                assert_ne!(had, mac, "the loaded state has the parent's address");
                assert_eq!(prep.ask(&["hostname"])?, "(none)");
                assert!(wall(&prep.ask(&["clock"])?) < (YEAR_2001 + 1_000_000) as f64);

                began = now();
                prep.wall_clock()?;
                prep.host_names()?;
                prep.network("eth0", &format!("{address}/24"))?;
                let (now_has, address_now, carrier) = interface(&prep.ask(&["net", "eth0"])?);
                assert_eq!((now_has, &*address_now, &*carrier), (mac, &*address, "0"), "the cable is out");
                Ok(())
            });
            let vm = vm.unwrap();
            let mut agent = Agent::of(&vm);
            until("the cable is in", || interface(&agent.ask("net eth0")).2 == "1");
            let identity = vm.vm().identity();
            assert_eq!(agent.ask("hostname"), identity.name.as_str());
            assert_eq!(agent.ask("machine-id"), identity.uuid.to_string().replace('-', ""));
            let wall = wall(&agent.ask("clock"));
            assert!(began <= wall && wall <= now() + 1.0, "the guest's clock says {wall}, ours {}", now());
            let (mac, has, _) = interface(&agent.ask("net eth0"));
            assert_eq!((&mac, has), (&identity.mac.to_string(), address));
            assert!(seen.insert(mac), "two clones have one MAC address");
            vm
        })
        .collect();
    assert_eq!(clones.len(), 2);
}

/// Spawns with a customization that is to fail, and returns why, when the process is gone and the books are as they were.
fn destroyed(
    booted: &Booted,
    patience: Duration,
    customize: impl FnOnce(&mut Prep<'_>) -> Result<(), offshoot::BoxError>,
) -> PrepError {
    let mut process = None;
    let spec = QemuClone { link: LinkState::Up, ..QemuClone::default() };
    let failed = booted.point.spawn_prepared(spec, patience, |prep| {
        process = Some(PathBuf::from(format!("/proc/{}", prep.vm().pid()?)));
        assert!(process.as_ref().unwrap().exists());
        customize(prep)
    });
    let error = failed.map(drop).unwrap_err();
    let process = process.unwrap();
    until("the clone's process is gone", || !process.exists());
    error
}

#[test]
fn a_customization_that_fails_destroys_the_clone_and_is_reported() {
    let Some(booted) = Booted::shared() else { return };
    let error = destroyed(&booted, LONG, |_| Err("no licence left".into()));
    assert!(matches!(&error, PrepError::Customize(why) if why.to_string() == "no licence left"), "{error}");
    let error = destroyed(&booted, LONG, |prep| {
        prep.ask(&["run", "60", "exit 3"])?;
        unreachable!("status 3 is an error");
    });
    assert!(error.to_string().contains("status 3"), "{error}");
    // Who is destroyed leaves nothing: the same address and name can be had again.
    let error = destroyed(&booted, LONG, |prep| Ok(prep.network("eth9", "10.0.0.1/8")?));
    assert!(error.to_string().contains("eth9"), "{error}");
    let paused = QemuClone { at_birth: AtBirth::Paused, ..QemuClone::default() };
    assert!(matches!(booted.point.spawn_prepared(paused, LONG, |_| Ok(())), Err(PrepError::Paused)));
}

#[test]
fn a_customization_that_hangs_destroys_the_clone_when_its_time_is_over() {
    let Some(booted) = Booted::shared() else { return };
    let patience = Duration::from_secs(2);
    let hangs = |prep: &mut Prep<'_>| Ok(prep.ask(&["run", "600", "sleep 600"]).map(drop)?);
    let error = destroyed(&booted, patience, hangs);
    assert!(matches!(error, PrepError::Timeout { patience: given } if given == patience), "{error}");
}
