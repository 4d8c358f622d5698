//! The suite is right about a source that does everything, and finds each defect.

use super::fake::{Defect, FakeRegistry};
use super::*;

#[tokio::test]
async fn a_source_that_does_everything_passes() {
    let report = conduct(&mut FakeRegistry::default()).await.unwrap();
    assert_eq!(report.skipped, Vec::<String>::new());
    assert_eq!(
        report.ran,
        [
            "a wrong name",
            "the initial state",
            "an instance more",
            "another weight",
            "an instance less",
            "on demand",
            "Errors",
            "SlowBody",
            "Silent",
            "HalfBody",
            "Garbage",
            "Restarts",
            "Rewinds",
            "RestartsEmpty",
            "an empty list",
            "the end",
        ]
    );
}

#[tokio::test]
async fn every_defect_is_found() {
    let defects = [
        (Defect::ErrorsAreEmpty, "Errors"),
        (Defect::HalvesAreWhole, "HalfBody"),
        (Defect::DiesOfErrors, "Errors"),
        (Defect::WaitsForEver, "Silent"),
        (Defect::HidesRestarts, "RestartsEmpty"),
        (Defect::TrustsTheIndex, "Rewinds"),
        (Defect::ForgetsWeights, "another weight"),
        (Defect::NeverRemoves, "an instance less"),
        (Defect::LeaksConnections, "the end"),
        (Defect::TakesAnyName, "a wrong name"),
    ];
    let suites = defects.map(|(defect, part)| {
        tokio::spawn(async move {
            let broken = conduct(&mut FakeRegistry::with_defect(defect)).await;
            let broken = broken.expect_err("a source with a defect has passed");
            assert_eq!(broken.part, part, "{defect:?}: {broken}");
        })
    });
    for suite in suites {
        suite.await.unwrap();
    }
}
