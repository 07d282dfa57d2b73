use kiln_agent::slot::{self, wire::*, Slot, SlotFiles};
use kiln_protocol::request::NetworkMode;
use std::io::Read;
fn main() {
    if std::env::args().nth(1).as_deref() == Some(slot::SHIM_ARGUMENT) { std::process::exit(slot::shim_main()); }
    let net = match std::env::args().nth(1).as_deref() { Some("none") => NetworkMode::None, Some("host") => NetworkMode::UnsafeHost, _ => NetworkMode::Isolated };
    let script = std::env::args().nth(2).unwrap();
    let rt = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    rt.block_on(async {
        let t = std::time::Instant::now();
        let dir = "/tmp/kiln/store"; 
        for d in ["", "/mnt", "/jobs"] { let d = format!("{dir}{d}"); std::fs::create_dir_all(&d).unwrap(); use std::os::unix::fs::PermissionsExt; std::fs::set_permissions(&d, std::fs::Permissions::from_mode(0o777)).unwrap(); }
        let store = std::fs::File::open(dir).unwrap();
        let lock = std::fs::File::create("/tmp/kiln/lock").unwrap();
        let (mut r, w) = std::io::pipe().unwrap();
        use std::os::fd::AsFd;
        let _ = nix::sys::stat::fchmod(w.as_fd(), nix::sys::stat::Mode::from_bits_truncate(0o666));
        let th = std::thread::Builder::new().spawn(move || { let mut s = String::new(); r.read_to_string(&mut s).unwrap(); s }).unwrap();
        let spec = SlotSpec { job: "j1".into(), ids: IdRange { first_uid: 200000, first_gid: 200000, count: 65536 }, drop_to: Some(User { uid: 999, gid: 995 }), network: net,
            blocked: vec![], allowed: None, stores: vec![], cache: Some(CacheMount { generations: vec![] }), input: None,
            files: vec![SlotFile { path: "/etc/resolv.conf".into(), contents: b"nameserver 10.0.2.3\n".to_vec(), mode: 0o644 }],
            limits: SlotLimits { pids: 300, disk_bytes: 200 << 20, file_bytes: 1 << 30, open_files: 1024 }, grace_ms: 2000 };
        let (stopper, mut stop) = kiln_agent::stop::channel();
        let mut s = match Slot::start(&spec, SlotFiles { store, lock, archive: None, log: w.into() }).await { Ok(s) => s, Err(e) => { println!("start: {e}"); return } };
        println!("started {:?}", t.elapsed());
        if let Ok(ms) = std::env::var("STOP_MS") { let ms: u64 = ms.parse().unwrap(); std::thread::Builder::new().spawn(move || { std::thread::sleep(std::time::Duration::from_millis(ms)); stopper.request(kiln_agent::stop::StopReason::Cancelled); std::thread::sleep(std::time::Duration::from_secs(60)); }).unwrap(); }
        let end = s.run(Step::Exec { argv: vec!["/bin/sh".into(), "-c".into(), script], env: vec![("PATH".into(), "/usr/bin:/usr/sbin".into())], network: true }, &mut stop).await;
        println!("{:?} {end:?}", t.elapsed());
        println!("{:?} {:?}", s.finish().await, t.elapsed());
        println!("LOG\n{}", th.join().unwrap());
    });
}
