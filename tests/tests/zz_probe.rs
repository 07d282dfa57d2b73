//! Probe.
#[test]
fn probe() {
    let lab = kiln_tests::lab::Lab::new();
    lab.context.file("a", "A");
    lab.dockerfile("FROM busybox:1\nCOPY a /a\nRUN echo x > /x\n");
    let _ = lab.image(&["--timestamp=0"]);
    std::fs::rename(lab.archive(), "/tmp/kiln/tests-scratch/1.tar").unwrap();
    let _ = lab.image(&["--timestamp=0"]);
    std::fs::rename(lab.archive(), "/tmp/kiln/tests-scratch/2.tar").unwrap();
    let out = format!("-odir:/tmp/kiln/tests-scratch/3dir");
    println!("{}", lab.build().arg(out).arg("--timestamp=0").run().output());
    println!("{:?}", kiln_tests::base::digest(&kiln_tests::base::BaseImage::busybox().pack().blobs[0]));
}
