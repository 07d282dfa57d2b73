//! What a real buildah printed, and what it means.

use super::*;

fn end(stderr: &str) -> StepEnd {
    StepEnd {
        exit: Exit::Code(125),
        stderr: stderr.to_owned(),
        breach: None,
        terminated: false,
        left: 0,
        leftovers: 0,
    }
}

/// Texts on the standard error of buildah 1.28.2, run as in a slot, and what they mean. Each was printed; hex ids
/// are shortened, as are the dumps of `copier.request`, which have a page of options.
///
/// How they came about. *Disk*: the job on a tmpfs of 24 MiB that a file fills up to some KiB. *File size*:
/// `ulimit -f`; a limit below the size of buildah's own program stops every RUN. *Killed*: SIGKILL to the
/// process `buildah-chroot-runtime` of a RUN, and to the child of a buildah that makes its own namespace.
/// *Memory*: `ulimit -v`. *Node*: an empty PATH; `max_user_namespaces` of 0; a store on an overlay mount.
/// *Store*: a base store with an empty `layers.json`, a layer's directory, its `link`, the directory `l` or its
/// tar-split file removed, that file or one of the layer's overwritten. *Network*: servers on the loopback
/// interface that close, reset, say nothing or answer with an error, and `unreachable` and `prohibit` routes; the
/// C library's resolver speaks of a temporary failure, and GODEBUG chose it. A RUN command
/// that is killed looks like one that exits with 1, and a killed buildah says nothing.
const WORDINGS: &[(&str, Reason, Option<i32>)] = &[
    // A file of somebody whom a slot does not know.
    (
        "Error: writing blob: adding layer with blob \"sha256:70f7\": processing tar file(potentially insufficient UIDs or GIDs available in user namespace (requested 65536:7 for /far): Check /etc/subuid and /etc/subgid if configured locally and run podman-system-migrate: lchown /far: invalid argument): exit status 1\n",
        Reason::LimitExceeded,
        None,
    ),
    (
        "Error: building at STEP \"ADD far.tar /d/\": storing \"/job/ctx/far.tar\": error during bulk transfer for copier.request{Request:\"PUT\", Root:\"/\", RemoveOptions:copier.RemoveOptions{All:false}}: copier: put: error setting ownership of \"/far\" to 65536:7: lchown /far: invalid argument\n",
        Reason::LimitExceeded,
        None,
    ),
    // A command that failed.
    ("Error: building at STEP \"RUN exit 37\": exit status 37\n", Reason::BuildFailed, Some(37)),
    ("Error: building at STEP \"RUN nosuchcmd\": exit status 127\n", Reason::BuildFailed, Some(127)),
    ("Error: building at STEP \"RUN exit 125\": exit status 125\n", Reason::BuildFailed, Some(125)),
    ("Error: building at STEP \"RUN kill -9 $$\": exit status 1\n", Reason::BuildFailed, Some(1)),
    (
        "Error: building at STEP \"RUN dd if=/dev/zero of=/x bs=1M count=40; exit $?\": exit status 153\n",
        Reason::LimitExceeded,
        Some(153),
    ),
    (
        "Error: building at STEP \"RUN /bin/dd if=/dev/zero of=/x bs=1M count=40\": exit status 1\n",
        Reason::BuildFailed,
        Some(1),
    ),
    (
        "Error: building at STEP \"RUN echo \"a\\\": exit status 9\" && exit 3\": exit status 3\n",
        Reason::BuildFailed,
        Some(3),
    ),
    (
        "Error: building at STEP \"RUN echo Error: no space left on device >&2; echo 'Error: building at STEP \"RUN x\": image not known' >&2; exit 4\": exit status 4\n",
        Reason::BuildFailed,
        Some(4),
    ),
    (
        "time=\"2026-11-23T18:48:12Z\" level=error msg=\"error unmounting container: unmounting build container \\\"9e8a\\\": write /job/run/containers/overlay-layers/.tmp-mountpoints.json2518739142: no space left on device\"\nError: building at STEP \"RUN dd if=/dev/zero of=/x bs=1k count=8000\": exit status 1\n",
        Reason::BuildFailed,
        Some(1),
    ),
    // An instruction that failed.
    (
        "Error: building at STEP \"RUN true\": determining run uid: user: unknown user error looking up user \"nosuch\"\n",
        Reason::BuildFailed,
        None,
    ),
    (
        "Error: building at STEP \"WORKDIR /f/x\": copier: mkdir: error checking directory \"/f/x\": mkdir /f/x: not a directory\n",
        Reason::BuildFailed,
        None,
    ),
    (
        "Error: building at STEP \"WORKDIR \"/image not known/x\"\": copier: mkdir: error checking directory \"/image not known/x\": mkdir /image not known/x: not a directory\n",
        Reason::BuildFailed,
        None,
    ),
    (
        "Error: building at STEP \"COPY . /bin/sh\": destination /bin/sh already exists but is not a directory\n",
        Reason::BuildFailed,
        None,
    ),
    (
        "Error: building at STEP \"COPY file /f/x\": 3 errors occurred:\n\t* reading \"/job/ctx/file\": passing bulk output from subprocess: io: read/write on closed pipe\n\t* closing \"/job/ctx/file\": reading tar archive: copying content for \"file\": io: read/write on closed pipe\n\t* storing \"/job/ctx/file\": error in copier subprocess: changing to intended-new-root directory \"/job/root/overlay/4f0d/merged/f\": chdir /job/root/overlay/4f0d/merged/f: not a directory\n\n\n",
        Reason::BuildFailed,
        None,
    ),
    (
        "Error: building at STEP \"ADD http://10.8.0.1/x /x\": reading \"http://10.8.0.1/x\": Get \"http://10.8.0.1/x\": dial tcp 10.8.0.1:80: connect: permission denied\n",
        Reason::BuildFailed,
        None,
    ),
    // A file that is not there.
    (
        "Error: building at STEP \"COPY nofile /x\": checking on sources under \"/job/ctx\": copier: stat: \"/nofile\": no such file or directory\n",
        Reason::NotFound,
        None,
    ),
    (
        "Error: building at STEP \"COPY ../nofile /x\": checking on sources under \"/job/ctx\": possible escaping context directory error: copier: stat: \"/nofile\": no such file or directory\n",
        Reason::NotFound,
        None,
    ),
    (
        "Error: building at STEP \"COPY no space left on device /x\": checking on sources under \"/job/ctx\": copier: stat: \"/no space left on device\": no such file or directory\n",
        Reason::NotFound,
        None,
    ),
    (
        "Error: building at STEP \"COPY file /x\": no items matching glob \"/job/ctx/file\" copied (1 filtered out using /etc/kiln/ign): no such file or directory\n",
        Reason::NotFound,
        None,
    ),
    (
        "Error: building at STEP \"ADD http://127.0.0.1:86/x /x\": reading \"http://127.0.0.1:86/x\": invalid response status 404\n",
        Reason::NotFound,
        None,
    ),
    // The network.
    (
        "Error: building at STEP \"ADD http://127.0.0.1:9/x /x\": reading \"http://127.0.0.1:9/x\": Get \"http://127.0.0.1:9/x\": dial tcp 127.0.0.1:9: connect: connection refused\n",
        Reason::Network,
        None,
    ),
    (
        "Error: building at STEP \"ADD http://nx.test/x /x\": reading \"http://nx.test/x\": Get \"http://nx.test/x\": dial tcp: lookup nx.test on 127.0.0.1:53: no such host\n",
        Reason::Network,
        None,
    ),
    (
        "Error: building at STEP \"ADD http://servfail.test/x /x\": reading \"http://servfail.test/x\": Get \"http://servfail.test/x\": dial tcp: lookup servfail.test on 127.0.0.1:53: server misbehaving\n",
        Reason::Network,
        None,
    ),
    (
        "Error: building at STEP \"ADD http://silent.test/x /x\": reading \"http://silent.test/x\": Get \"http://silent.test/x\": dial tcp: lookup silent.test on 127.0.0.1:53: read udp 127.0.0.1:54340->127.0.0.1:53: i/o timeout\n",
        Reason::Network,
        None,
    ),
    (
        "Error: building at STEP \"ADD http://servfail.test/x /x\": reading \"http://servfail.test/x\": Get \"http://servfail.test/x\": dial tcp: lookup servfail.test: Temporary failure in name resolution\n",
        Reason::Network,
        None,
    ),
    (
        "Error: building at STEP \"ADD http://127.0.0.1:81/x /x\": reading \"http://127.0.0.1:81/x\": Get \"http://127.0.0.1:81/x\": read tcp 127.0.0.1:39614->127.0.0.1:81: read: connection reset by peer\n",
        Reason::Network,
        None,
    ),
    (
        "Error: building at STEP \"ADD http://10.1.2.3/x /x\": reading \"http://10.1.2.3/x\": Get \"http://10.1.2.3/x\": dial tcp 10.1.2.3:80: connect: network is unreachable\n",
        Reason::Network,
        None,
    ),
    (
        "Error: building at STEP \"ADD http://10.9.0.1/x /x\": reading \"http://10.9.0.1/x\": Get \"http://10.9.0.1/x\": dial tcp 10.9.0.1:80: connect: no route to host\n",
        Reason::Network,
        None,
    ),
    (
        "Error: building at STEP \"ADD https://127.0.0.1:83/x /x\": reading \"https://127.0.0.1:83/x\": Get \"https://127.0.0.1:83/x\": net/http: TLS handshake timeout\n",
        Reason::Network,
        None,
    ),
    (
        "Error: building at STEP \"ADD http://127.0.0.1:84/x /x\": reading \"http://127.0.0.1:84/x\": Get \"http://127.0.0.1:84/x\": EOF\n",
        Reason::Network,
        None,
    ),
    (
        "Error: building at STEP \"ADD http://127.0.0.1:85/x /x\": reading \"http://127.0.0.1:85/x\": invalid response status 503\n",
        Reason::Network,
        None,
    ),
    (
        "Error: building at STEP \"ADD http://127.0.0.1:82/x /x\": 2 errors occurred:\n\t* reading \"http://127.0.0.1:82/x\": writing content from \"http://127.0.0.1:82/x\" to tar stream: unexpected EOF\n\t* storing \"http://127.0.0.1:82/x\": error during bulk transfer for copier.request{Request:\"PUT\", Root:\"/\", RemoveOptions:copier.RemoveOptions{All:false}}: copier: put: error creating \"/x\": copier: put: error writing file \"/x\": unexpected EOF\n\n\n",
        Reason::Network,
        None,
    ),
    // A Dockerfile or request that buildah refuses.
    (
        "Error: building at STEP \"FOO \": Build error: Unknown instruction: \"FOO\" &imagebuilder.Step{Env:[]string{\"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\"}, Command:\"foo\", Args:[]string{\"\"}, Flags:[]string{}, Attrs:map[string]bool(nil), Message:\"FOO \", Original:\"FOO bar\"}\n",
        Reason::BadRequest,
        None,
    ),
    (
        "Error: building at STEP \"RUN --mount=type=foo,target=/x true\": resolving mountpoints for container \"a98c\": invalid mount type \"foo\"\n",
        Reason::BadRequest,
        None,
    ),
    (
        "Error: building at STEP \"RUN --mount=type=bind,foo=bar true\": resolving mountpoints for container \"a98c\": foo: invalid mount option\n",
        Reason::BadRequest,
        None,
    ),
    (
        "Error: building at STEP \"RUN --mount=type=bind,source=/x true\": resolving mountpoints for container \"a98c\": must set volume destination\n",
        Reason::BadRequest,
        None,
    ),
    (
        "Error: building at STEP \"RUN --mount=type=secret,id=zz,required=true true\": resolving mountpoints for container \"a98c\": secret required but no secret with id zz found\n",
        Reason::BadRequest,
        None,
    ),
    (
        "Error: building at STEP \"RUN --mount=type=secret,foo=bar true\": resolving mountpoints for container \"a98c\": secret should have syntax id=id[,target=path,required=bool,mode=uint,uid=uint,gid=uint\n",
        Reason::BadRequest,
        None,
    ),
    (
        "Error: building at STEP \"RUN --mount=type=bind,from=nosuch,target=/x true\": type=bind,from=nosuch,target=/x from=nosuch: no stage or image found with that name\n",
        Reason::BadRequest,
        None,
    ),
    ("Error: COPY --from=nostage: no stage or image found with that name\n", Reason::BadRequest, None),
    ("Error: The target \"nope\" was not found in the provided Dockerfile\n", Reason::BadRequest, None),
    ("Error: no FROM statement found\n", Reason::BadRequest, None),
    ("Error: no contents in \"/etc/kiln/Dockerfile\"\n", Reason::BadRequest, None),
    ("Error: unknown flag: --nosuch\n", Reason::BadRequest, None),
    (
        "Error: parsing main Dockerfile: /etc/kiln/Dockerfile: invalid ESCAPE 'x'. Must be ` or \\\n",
        Reason::BadRequest,
        None,
    ),
    (
        "Error: resolving step {Value:env Next:0xc0003bac40 Children:[] Attributes:map[] Original:ENV a=\"b Flags:[] StartLine:2 EndLine:2}: unexpected end of statement while looking for matching double-quote\n",
        Reason::BadRequest,
        None,
    ),
    ("Error: creating build container: invalid reference format\n", Reason::BadRequest, None),
    // A full disk.
    (
        "Error: building at STEP \"COPY big /x\": 3 errors occurred:\n\t* reading \"/job/ctx/big\": error during bulk transfer for copier.request{Request:\"GET\", Root:\"/\", RemoveOptions:copier.RemoveOptions{All:false}}: copier: get: \"/big\": copying /big: write bulk-writer: broken pipe\n\t* closing \"/job/ctx/big\": reading tar archive: copying content for \"big\": io: read/write on closed pipe\n\t* storing \"/job/ctx/big\": error during bulk transfer for copier.request{Request:\"PUT\", Root:\"/\", RemoveOptions:copier.RemoveOptions{All:false}}: copier: put: error creating \"/x\": copier: put: error writing file \"/x\": write /x: no space left on device\n\n\n",
        Reason::DiskFull,
        None,
    ),
    (
        "Error: committing container for step {Env:[PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin] Command:copy Args:[big /x] Flags:[] Attrs:map[] Message:COPY big /x Original:COPY big /x}: copying layers and metadata for container \"d62e\": initializing source containers-storage:busybox-working-container: storing layer \"2c40\" to file: io: read/write on closed pipe\nFailed to write to log, write /proc/self/fd/1: file already closed\nFailed to write to log, write /proc/self/fd/1: file already closed\n",
        Reason::DiskFull,
        None,
    ),
    (
        "Error: committing container for step {Env:[PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin] Command:copy Args:[big /x] Flags:[] Attrs:map[] Message:COPY big /x Original:COPY big /x}: copying layers and metadata for container \"d62e\": writing blob: storing blob to file \"/job/tmp/storage2115705450/1\": write /job/tmp/storage2115705450/1: no space left on device\n",
        Reason::DiskFull,
        None,
    ),
    (
        "Error: creating build container: creating container: write /job/root/overlay-layers/.tmp-layers.json4109956768: no space left on device\nFailed to write to log, write /proc/self/fd/1: file already closed\n",
        Reason::DiskFull,
        None,
    ),
    (
        "Error: mounting new container: mounting build container \"c50c\": write /job/run/containers/overlay-layers/.tmp-mountpoints.json3399576934: no space left on device\n",
        Reason::DiskFull,
        None,
    ),
    (
        "Error: pushing image \"localhost/busybox:1\" to \"dir:/job/export/x\": reading blob sha256:5a1c: write /job/tmp/2772608775: no space left on device\n",
        Reason::DiskFull,
        None,
    ),
    (
        "Error: writing blob: storing blob to file \"/job/tmp/storage537522514/1\": write /job/tmp/storage537522514/1: no space left on device\n",
        Reason::DiskFull,
        None,
    ),
    // A file past its limit, in buildah itself.
    ("Error: building at STEP \"RUN true\": signal: file size limit exceeded\n", Reason::LimitExceeded, None),
    (
        "Error: building at STEP \"COPY big /x\": 3 errors occurred:\n\t* reading \"/job/ctx/big\": error during bulk transfer for copier.request{Request:\"GET\", Root:\"/\", RemoveOptions:copier.RemoveOptions{All:false}}: copier: get: \"/big\": copying /big: write bulk-writer: broken pipe\n\t* closing \"/job/ctx/big\": reading tar archive: copying content for \"big\": io: read/write on closed pipe\n\t* storing \"/job/ctx/big\": error during bulk transfer for copier.request{Request:\"PUT\", Root:\"/\", RemoveOptions:copier.RemoveOptions{All:false}}: copier: put: error creating \"/x\": copier: put: error writing file \"/x\": write /x: file too large\n\n\n",
        Reason::LimitExceeded,
        None,
    ),
    (
        "Error: pushing image \"localhost/busybox:1\" to \"dir:/job/export/x\": reading blob sha256:8c32: write /job/tmp/2533951675: file too large\n",
        Reason::LimitExceeded,
        None,
    ),
    // Killed, or no memory.
    ("Error: building at STEP \"RUN sleep 12; true\": signal: killed\n", Reason::OutOfMemory, None),
    (
        "time=\"2026-11-23T19:03:01Z\" level=error msg=\"signal: killed\"\ntime=\"2026-11-23T19:03:01Z\" level=error msg=\"(Unable to determine exit status)\"\n",
        Reason::OutOfMemory,
        None,
    ),
    (
        "fatal error: failed to reserve page summary memory\n\nruntime stack:\nruntime.throw({0xfbd1d7?, 0x7ffcb9baa190?})\n",
        Reason::OutOfMemory,
        None,
    ),
    // A node that cannot.
    (
        "time=\"2026-11-23T19:00:16Z\" level=error msg=\"finding newgidmap: exec: \\\"newgidmap\\\": executable file not found in $PATH\"\ntime=\"2026-11-23T19:00:16Z\" level=error msg=\"(Unable to determine exit status)\"\n",
        Reason::NodeUnfit,
        None,
    ),
    (
        "Error during unshare(CLONE_NEWUSER): No space left on device\nUser namespaces are not enabled in /proc/sys/user/max_user_namespaces.\n",
        Reason::NodeUnfit,
        None,
    ),
    (
        "Error: 'overlay' is not supported over overlayfs, a mount_program is required: backing file system is unsupported for this graph driver\nFailed to write to log, write /proc/self/fd/1: file already closed\n",
        Reason::NodeUnfit,
        None,
    ),
    // A damaged store.
    ("Error: creating build container: localhost/busybox:1: image not known\n", Reason::StoreCorrupt, None),
    (
        "Error: pushing image \"sha256:f31d\" to \"dir:/job/export/x\": reading layer \"3384\" in image \"67eb\": layer not known\n",
        Reason::StoreCorrupt,
        None,
    ),
    (
        "Error: creating build container: creating container: creating read-write layer with ID \"9b28\": Stat /job/root/overlay/3384: no such file or directory\n",
        Reason::StoreCorrupt,
        None,
    ),
    (
        "Error: creating build container: creating container: creating read-write layer with ID \"bbc1\": open /b/0/overlay/3384/link: no such file or directory\n",
        Reason::StoreCorrupt,
        None,
    ),
    (
        "Error: mounting new container: mounting build container \"85f2\": creating overlay mount to /job/root/overlay/339b/merged, mount_data=\"lowerdir=/job/root/overlay/l/3GQD,upperdir=/job/root/overlay/339b/diff,workdir=/job/root/overlay/339b/work,,userxattr,volatile\": no such file or directory\n",
        Reason::StoreCorrupt,
        None,
    ),
    (
        "Error: pushing image \"sha256:f31d\" to \"dir:/job/export/x\": reading blob sha256:3384: 1 error occurred:\n\t* creating file-getter: readlink /job/root/overlay/3384/diff: no such file or directory\n\n\n",
        Reason::StoreCorrupt,
        None,
    ),
    (
        "Error: pushing image \"sha256:f31d\" to \"dir:/job/export/x\": reading blob sha256:3384: unexpected EOF\n",
        Reason::StoreCorrupt,
        None,
    ),
    (
        "Error: pushing image \"sha256:f31d\" to \"dir:/job/export/x\": reading blob sha256:3384: file integrity checksum failed for \"bin/[\"\n",
        Reason::StoreCorrupt,
        None,
    ),
    (
        "Error: pushing image \"sha256:f31d\" to \"dir:/job/export/x\": writing blob: happened during read: Digest did not match, expected sha256:3384, got sha256:85ec\n",
        Reason::StoreCorrupt,
        None,
    ),
];

#[test]
fn a_foreign_owner_is_named_without_advice_for_another_program() {
    let texts = WORDINGS.iter().filter(|(text, ..)| text.contains(": lchown /far: "));
    let messages: Vec<_> = texts.map(|(text, ..)| classify(&end(text)).message).collect();
    let wanted = "/far belongs to 65536:7; a slot has the user and group ids 0 to 65535";
    assert_eq!(messages, [wanted, wanted]);
}

#[test]
fn errors_mean_what_the_table_says() {
    for (stderr, reason, code) in WORDINGS {
        let verdict = classify(&end(stderr));
        assert_eq!((verdict.reason, verdict.run_exit_code), (*reason, *code), "{stderr}");
        assert!(!verdict.message.is_empty(), "{stderr}");
    }
}

#[test]
fn the_text_of_an_instruction_decides_nothing() {
    for text in ["no space left on device", "image not known", "connection refused", "newuidmap"] {
        let stderr = format!("Error: building at STEP \"RUN echo {text}; exit 1\": exit status 1\n");
        assert_eq!(classify(&end(&stderr)).reason, Reason::BuildFailed, "{text}");
        let stderr = format!("Error: building at STEP \"COPY \"{text}\" /x\": user: unknown user\n");
        assert_eq!(classify(&end(&stderr)).reason, Reason::BuildFailed, "{text}");
    }
}

#[test]
fn the_failing_step_is_named_whole() {
    let stderr = "Error: building at STEP \"RUN a \"b\": c\": exit status 3\n";
    assert_eq!(classify(&end(stderr)).step.as_deref(), Some("RUN a \"b\": c"));
}

#[test]
fn every_rule_has_a_captured_text() {
    for (regex, rule) in COMPILED.iter() {
        let regex = regex.as_ref().unwrap();
        let hit = WORDINGS.iter().any(|(text, reason, _)| {
            let cause = own_error(text).map_or(text.trim(), |error| split_step(error).1);
            *reason == rule.reason && regex.is_match(cause)
        });
        assert!(hit, "{}", rule.pattern);
    }
}

#[test]
fn what_no_rule_knows_is_unknown() {
    for stderr in ["Error: something nobody has seen\n", "", "\n", "Error: "] {
        let verdict = classify(&end(stderr));
        assert_eq!(verdict.reason, Reason::Unknown, "{stderr}");
        assert!(!verdict.message.is_empty());
    }
}

#[test]
fn a_run_that_prints_any_of_these_texts_is_a_failed_run() {
    for (text, ..) in WORDINGS {
        for quoted in [(*text).to_owned(), format!("printf '{text}'"), format!("cat <<EOF\n{text}EOF")] {
            let stderr =
                format!("level=warning\nError: building at STEP \"RUN {quoted}; exit 7\": exit status 7\n");
            let verdict = classify(&end(&stderr));
            assert_eq!((verdict.reason, verdict.run_exit_code), (Reason::BuildFailed, Some(7)), "{stderr}");
        }
    }
}

#[test]
fn a_run_whose_text_is_longer_than_what_is_kept_is_a_failed_run() {
    let stderr = "no space left on device\nimage not known\": exit status 3\n";
    let verdict = classify(&StepEnd { exit: Exit::Code(3), ..end(stderr) });
    assert_eq!((verdict.reason, verdict.run_exit_code), (Reason::BuildFailed, Some(3)));
}

#[test]
fn a_quoted_cause_does_not_belong_to_the_text_of_a_run() {
    let stderr = "Error: building at STEP \"RUN --mount=type=foo true\": resolving mountpoints for container \"883d\": invalid mount type \"foo\"\n";
    assert_eq!(classify(&end(stderr)).step.as_deref(), Some("RUN --mount=type=foo true"));
}

#[test]
fn messages_leave_buildahs_structures_out() {
    for (text, ..) in WORDINGS
        .iter()
        .filter(|(text, ..)| text.contains(" for copier.request{") || text.contains(" for step {"))
    {
        let message = classify(&end(text)).message;
        assert!(!message.contains('{') && !message.contains('}'), "{message}");
    }
}

#[test]
fn every_rule_is_a_regular_expression() {
    assert!(COMPILED.iter().all(|(regex, _)| regex.is_some()));
    assert!(DUMPS.is_some() && FOREIGN_OWNER.is_some());
}

#[test]
fn an_end_without_a_word_is_told_by_its_exit() {
    let killed = StepEnd { exit: Exit::Killed, ..end("") };
    assert_eq!(classify(&killed).reason, Reason::OutOfMemory);
    let signal = StepEnd { exit: Exit::Signal(11), ..end("") };
    assert!(classify(&signal).message.contains("signal 11"));
}
