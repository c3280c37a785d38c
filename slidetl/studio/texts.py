"""Every text of the pages; templates and messages take them from here by name."""

from __future__ import annotations

from collections.abc import Mapping

TEXTS: Mapping[str, str] = {
    # of every page
    "app.name": "slidetl studio",
    "app.disclaimer": "For research; not a medical device.",
    "app.skip": "Skip to the content",
    "app.local": "Nothing leaves this machine unless you publish a model to a bucket.",
    "nav.steps": "Steps of the project",
    "nav.slides": "Slides",
    "nav.labels": "Labels",
    "nav.train": "Train",
    "nav.model": "Model",
    "nav.grade": "Grade",
    "name.project": "project",
    "name.model": "model",
    "error.title": "That did not work",
    "error.back": "Back",
    "error.unknown": "Something unexpected happened; the terminal of the studio says more.",
    "form.size": "This form is larger than the studio takes.",
    "form.csrf": "This page is too old to change anything; load it again and repeat the last step.",
    "command.same": "The same from a command line, in the project's folder",
    "command.copy": "Copy",
    "command.copied": "Copied",
    # who may ask
    "guard.host": "This address is not one of the studio's; open the address that its terminal prints.",
    "guard.origin": "Refused: this change comes from another page than the studio's.",
    "guard.token": (
        "Open the address that the studio printed in its terminal; it works once. If it is used up, end "
        "the studio and start it again: no job is lost."
    ),
    "guard.session": "You are not signed in any more; load the page again.",
    "login.title": "Sign in",
    "login.password": "Password",
    "login.enter": "Sign in",
    "login.wrong": "This is not the password.",
    # first page
    "home.title": "Projects",
    "home.lead": (
        "A project takes you from a folder of slides and a list of grades to a classifier that you have "
        "judged, and that grades your next slides."
    ),
    "home.open": "Open a project",
    "home.none": "There is no project yet.",
    "home.new": "New project",
    "home.name": "Name",
    "home.name_hint": "Letters, digits, - and _; for example lung-fibrosis.",
    "home.grades": "Grades, lowest first",
    "home.grades_hint": (
        "Separated by commas; for example none, mild, moderate, severe. They cannot be changed later."
    ),
    "home.mpp": "Detail, in micrometres per pixel",
    "home.mpp_hint": "1 shows architecture (10x), 0.5 shows cells (20x), 2 shows large patterns (5x).",
    "home.tile": "Side of a tile, in pixels",
    "home.tile_hint": "224 fits the pretrained networks.",
    "home.create": "Create the project",
    "home.bad_grades": "a grade has a name of at most 40 letters, not beginning with -; at most 20 grades",
    "project.none": "there is no such project",
    "project.exists": "a project or folder of this name is there already; choose another name",
    # slides
    "slides.title": "Slides",
    "slides.lead": (
        "Choose the folder with your slides, then cut them into tiles. The slides themselves are only read."
    ),
    "slides.folder": "Folder of the slides",
    "slides.chosen": "{n} slides in {folder}",
    "slides.choose": "Use this folder",
    "slides.here": "You are in",
    "slides.top": "top folder",
    "slides.up": "One folder up",
    "slides.count": "{n} slides",
    "slides.no_folders": "No folders in here.",
    "slides.unnamed": "{n} names here are not UTF-8 and cannot be used; rename them.",
    "slides.change": "Choose a folder",
    "slides.no_folder": "there is no such folder",
    "slides.none": "no slide of this folder lies in the folder of the studio",
    "slides.outside": "{n} slides are left out: they are links that lead out of the studio's folder",
    "slides.unwritable": (
        "{n} slides are left out: their names have letters that no table can hold (not UTF-8, a line break, "
        "an odd blank); rename them"
    ),
    "slides.aside": (
        "Labels of {n} slides that are not there now are kept aside, and come back with the slides: {names}"
    ),
    "slides.too_many": "{n} slides are more than the {most} that a project takes",
    "slides.taken": "{n} slides found.",
    "slides.tiling": "Tiles",
    "slides.tile": "Cut the slides into tiles",
    "slides.again": "Look for new slides, and tile again",
    "slides.tile_hint": (
        "Tiles with less than a quarter of tissue are left out; pen, folds and blur are kept. It takes "
        "about a minute for each slide; finished slides are kept."
    ),
    "slides.mistakes": "The labels have faults; correct them before you go on.",
    "slides.list": "All slides",
    "slides.not_tiled": "not tiled yet",
    "slides.used": "{n} tiles",
    "slides.excluded": "left out",
    "slides.failed": "cannot be used",
    "slides.other_file": (
        "the last tiling was of another file of this name; cut the slides into tiles again. If that fails, "
        "rename the file, or make another project for these slides"
    ),
    "slides.spacing": "{mpp} µm per pixel",
    "slides.picture": "{name}: the slide from afar; its tissue is outlined",
    "slides.detail": "Show which tiles are kept",
    "slides.summary": "{used} of {n} slides are ready, {bad} with a problem.",
    "upload.title": "Upload slides",
    "upload.hint": (
        "Better: copy slides into the folder on this machine, since a slide has gigabytes. Small ones "
        "can be uploaded, at most {most} GB each."
    ),
    "upload.choose": "Slides to upload",
    "upload.start": "Upload",
    "upload.use": "Use the uploaded slides",
    "upload.done": "uploaded",
    "upload.too_large": (
        "this file is larger than the {most} GB that the studio takes; copy it into the folder instead"
    ),
    "upload.no_room": "the disk has no room for this file",
    "upload.exists": "a file of this name is there already",
    "upload.name": "a slide's name ends in one of {suffixes}, and has letters, digits, . - and _ only",
    "upload.short": "the upload was cut off; try again",
    # labels
    "labels.title": "Labels",
    "labels.lead": (
        "Give each slide its patient and its grade. Slides of one patient are never divided between "
        "training and test."
    ),
    "labels.bring": "Bring a table",
    "labels.bring_hint": (
        "A CSV file as spreadsheets export it, with a column slide_id (the file's name) and any of "
        "patient_id, grade, site."
    ),
    "labels.file": "Table (CSV)",
    "labels.take": "Take the labels of this table",
    "labels.table": "the table",
    "labels.strange": "{n} lines of the table are of no slide of this project: {names}",
    "labels.ignored": "columns of the table that are not taken: {names}",
    "labels.numbers": "numbers of the table were read as grades: {grades}",
    "labels.emptied": "{n} slides have lost a label, since it is empty in the table: {names}",
    "labels.refused": "nothing is taken of this table; correct it first: {faults}",
    "labels.ragged": "line {line} has {found} cells, expected {wanted} as in the header",
    "labels.twice": "lines {first} and {line} are both of {name}, and differ",
    "labels.ambiguous": "line {line}: {name} may be any of {names}; write one of these",
    "labels.aside": (
        "Labels of {n} slides that are not in the chosen folder now are kept aside. They come back with "
        "the slides; where these have moved, download the labels and bring them as a table."
    ),
    "labels.download_aside": "Download the labels kept aside (CSV)",
    "labels.download": "Download the labels (CSV)",
    "labels.grid": "Grades of the slides",
    "labels.slide": "Slide",
    "labels.patient_id": "Patient",
    "labels.grade": "Grade",
    "labels.site": "Site",
    "labels.of": "{column} of {slide}",
    "labels.scale": "Grades: {grades}. Type one of them; leave empty what is not graded.",
    "labels.scale_numbers": (
        "Grades: {grades}. Type the name, or its number; leave empty what is not graded."
    ),
    "labels.save": "Save the labels",
    "labels.saved": "Saved: no fault found.",
    "labels.faults": (
        "Rows with a fault: {n}. They are marked below; nothing is trained before they are corrected."
    ),
    "labels.bad_grade": "grade must be one of {grades} (empty: not graded), found {found}",
    "labels.long": "a cell has at most {most} letters; shorten the one that begins with: {found}",
    "labels.other_slides": (
        "Nothing is saved: the slides of this project have changed since this page was opened. What you "
        "typed for those that are here is in the cells below; check it, and save again."
    ),
    "labels.clash": (
        "Nothing is saved: someone else has changed {names} since this page was opened. What you typed is "
        "in the cells below; check the marked rows, and save again."
    ),
    "labels.strange_cells": "Typed for slides that are not here now: {texts}",
    "labels.now": "someone else has typed: {texts}. Saving again replaces that by your cells",
    "labels.nothing": "nothing",
    "labels.restored": "What you typed was not saved. It is in the cells below; check it, and save it.",
    "labels.outside": "this slide's file lies outside of the studio's folder",
    "labels.unreadable": "the labels of this project cannot be read",
    "labels.no_slides": "Choose the folder of the slides first.",
    "labels.counts": "What you have",
    "labels.count_grade": "Slides",
    "labels.ungraded": "not graded",
    "labels.patients": "Patients",
    "labels.leaks": "What would leak",
    "labels.leaks_hint": (
        "A network that has seen a patient in training grades that patient's other slides too well."
    ),
    "labels.no_leak": "Nothing found.",
    "labels.copies": "the same slide under different patients: {names}",
    "labels.own": (
        "Each slide counts as a patient of its own. If a patient has several slides, give them one "
        "patient name."
    ),
    # train
    "train.title": "Train",
    "train.lead": "Choose a way. Each keeps a quarter of the patients aside, and is judged on them alone.",
    "train.choice": "Way of training",
    "train.ridge": "Features and ridge",
    "train.ridge_about": (
        "A pretrained network describes every tile, and a simple formula is fitted to the averages. "
        "Minutes. Begin here."
    ),
    "train.warm": "Warm restart",
    "train.warm_about": (
        "The pretrained network itself learns your slides, its upper layers first. Hours without a GPU."
    ),
    "train.shared": "Shared representation",
    "train.shared_about": (
        "The network learns your slides but is held close to what it knew. Hours without a GPU; may help"
        " with few slides."
    ),
    "train.compare": "Compare them",
    "train.compare_about": (
        "All three on the same five divisions of the patients, with intervals. The honest answer to "
        "which is best; takes a night."
    ),
    "train.more": "More",
    "train.epochs": "Rounds through the slides at most (not for features and ridge)",
    "train.start": "Add to the queue",
    "train.started": "{run} is in the queue.",
    "train.bad": "unknown choice, or a number of rounds out of 1 to 1000",
    "train.not_ready": (
        "Before training: choose slides, cut them into tiles, and give at least some of them grades "
        "without faults."
    ),
    "train.queue": "Queue",
    "train.curve": "Learning curve",
    "train.curve_of": "Learning curve of {run}",
    "train.curve_hint": (
        "val/qwk: agreement with your grades on patients kept aside, 1 is perfect; train/loss and "
        "val/rps: errors, lower is better."
    ),
    # jobs
    "jobs.none": "Nothing is running.",
    "jobs.stop": "Stop",
    "jobs.resume": "Resume",
    "jobs.of": "{action} {job}",
    "jobs.log": "Log",
    "jobs.state_waiting": "waiting",
    "jobs.state_running": "running",
    "jobs.state_stopping": "stopping",
    "jobs.state_done": "done",
    "jobs.state_failed": "failed",
    "jobs.state_stopped": "stopped",
    "jobs.partly": "done, some slides failed",
    "jobs.kind_tile": "Tiles",
    "jobs.kind_train": "Training {target}",
    "jobs.kind_export": "Export of {target}",
    "jobs.kind_publish": "Publication of {target}",
    "jobs.kind_pull": "Model {target} from a library",
    "jobs.kind_grade": "Grading {target}",
    "jobs.lost": "No connection to the studio: what you see here may be old. Load the page again.",
    "jobs.gone": "{title} of project {project}, which is gone",
    "jobs.behind": "behind {title} of project {project}",
    "jobs.trouble": "jobs cannot be looked after now: {reason}",
    "jobs.step": "step {step} of {steps}",
    "jobs.progress": "{stage}: {done} of {total} {unit}",
    "jobs.progress_open": "{stage}",
    # model
    "model.title": "Model",
    "model.lead": "How good is it, on patients that it never saw?",
    "model.run": "Training",
    "model.show": "Show",
    "model.none": "There is no finished training yet.",
    "model.unfinished": "This training has no results yet.",
    "model.verdict": "Verdict",
    "model.exact": "{right} of {n} test slides have exactly your grade",
    "model.ungraded": (
        "Of {n} more test slides the model gives no grade, and they are in no number here: {names}"
    ),
    "model.interval": "95 % interval {low} to {high}, over {n} patients",
    "model.no_interval": "no interval: too few patients, or all samples of them give the same",
    "model.undefined": "undefined on these slides",
    "model.accuracy": "Exactly right",
    "model.qwk": "Agreement (quadratic-weighted kappa)",
    "model.mae": "Mean error, in grades",
    "model.confusion": "Your grade against the model's",
    "model.true": "your grade",
    "model.predicted": "model",
    "model.calibration": "Are its probabilities right?",
    "model.calibration_hint": (
        "Of slides that it was so sure of, so many were right. By chance alone the share lies in the "
        "range in 95 of 100 cases."
    ),
    "model.bin": "Sure",
    "model.bin_right": "Right",
    "model.bin_range": "Range",
    "model.slides": "Slides",
    "model.sites": "By site",
    "model.no_site": "no site given",
    "model.limits": "Limits",
    "model.limit_few": (
        "The test part has {n} patients. That is few: trust the interval, not the single number."
    ),
    "model.limit_some": "The test part has {n} patients.",
    "model.limit_absent": "No test slide has grade {grades}: nothing is known about them.",
    "model.limit_one_site": (
        "All test slides are of one site. Another scanner or stain may give other grades."
    ),
    "model.limit_population": (
        "The numbers hold for patients like yours. They say nothing of other organs, stains or diseases."
    ),
    "model.limit_research": "It is a tool for research. No patient is to be treated by it.",
    "model.referral": "Leave the unsure slides to a human",
    "model.risk": "Acceptable share of patients with a wrong grade",
    "model.risk_show": "Work out",
    "model.rule": (
        "Let the model grade slides that it is at least {confidence} sure of: {coverage} of the slides. "
        "Of these {wrong} were wrong here, and with 95 % confidence at most {upper} of patients will be."
    ),
    "model.no_rule": (
        "With so few test patients no rule keeps this risk with 95 % confidence: let a human look at "
        "every slide, or test on more patients."
    ),
    "model.arms": "QWK of each way, 95 % interval over patients",
    "model.arm": "Way",
    "model.question": "Question: is {arm} better than {against}?",
    "model.compared": "Difference in agreement {estimate}; {p} by the test that decides (sign flips).",
    "model.compared_interval": "95 % interval over patients {low} to {high}.",
    "model.clear": "{arm} is better.",
    "model.not_clear": "No difference is shown. Take the simpler one, or test on more patients.",
    "model.no_finding": "No finding: one of the two learned nothing.",
    "model.dead": (
        "Learned nothing in at least one training, all slides having got the same probabilities: {arms}. "
        "A difference from such a way is no finding; the report names the remedies."
    ),
    "model.no_test": "The difference cannot be computed on these patients. Test on more of them.",
    "model.report": "Full report of the comparison",
    "model.train_one": "Train the way that you choose by itself; the comparison keeps no single model.",
    "model.export": "Export",
    "model.export_hint": "Writes one file that grades slides, without the names of patients and slides.",
    "model.licence": "Licence of the weights",
    "model.export_start": "Export this model",
    "model.exported": "Exported as {name}.pt. It is on the page Grade.",
    "model.evidence_few": (
        "With fewer than 10 test patients the file carries no evidence, and gives no sets of grades."
    ),
    "model.relabelled": (
        "{n} slides have another patient or grade now than in this training: {names}. The results below are "
        "of the labels of then, and may be of patients that it has seen. Train again."
    ),
    "model.evidence_relabelled": (
        "As labels have changed since, the file carries no evidence, and gives no sets of grades."
    ),
    "model.no_checkpoint": "this training has no model to export",
    "model.publish": "Publish",
    "model.publish_hint": (
        "Copies a model with its card to a library: a folder below the studio's, or a bucket that your "
        "hospital has set up (s3://, gs://, abfs://). A bucket is on another machine."
    ),
    "model.model": "Model",
    "model.to": "Library",
    "model.publish_name": "Name in the library",
    "model.publish_name_hint": "Small letters, digits, . _ and -; a name in use is refused.",
    "model.description": "What is it for?",
    "model.intended": "What may it be used for, and what not?",
    "model.publish_start": "Publish",
    "model.pull": "Take a model from a library",
    "model.pull_name": "Name of the model",
    "model.pull_start": "Take it",
    "model.bad_library": (
        "a library is a folder below the studio's folder, or begins with s3://, gs:// or abfs://"
    ),
    "model.bad_name": "the name of a model has small letters, digits, . _ and - only",
    "model.queued": "{what} is in the queue, on this page.",
    # grade
    "grade.title": "Grade",
    "grade.lead": (
        "Choose a model and new slides. Each slide gets a grade, and a page that shows what counted."
    ),
    "grade.model": "Model",
    "grade.no_model": "There is no model yet: export one, or take one from a library.",
    "grade.damaged": "cannot be read",
    "grade.pulled": "from a library",
    "grade.card": "grades {grades}; {training}",
    "grade.card_training": "trained on {slides} slides of {patients} patients",
    "grade.card_untold": "its training is not told",
    "grade.slides": "Slides to grade",
    "grade.all": "All slides of this folder",
    "grade.start": "Grade",
    "grade.nothing": "choose at least one slide",
    "grade.no_slide": "only slides can be graded, chosen in their folder",
    "grade.no_such_model": "there is no such model",
    "grade.results": "Results of {name}",
    "grade.none": "Nothing is graded yet.",
    "grade.slide": "Slide",
    "grade.result": "Grade",
    "grade.sure": "Sure",
    "grade.set": "Set of grades",
    "grade.to": "to",
    "grade.set_unnamed": "see its page: the model file is not the one of then",
    "grade.unreadable": "{n} tiles could not be read",
    "grade.novelty": "novelty {novelty}; at most 1 in the training slides",
    "grade.open": "Page",
    "grade.page_of": "Page of {slide}",
    "grade.qupath": "QuPath",
    "grade.qupath_of": "QuPath file of {slide}",
    "grade.csv": "Download the table (CSV)",
    "grade.failed": "not graded: {reason}",
}


def say(name: str, /, **values: object) -> str:
    """Returns a text with its values filled in."""
    return TEXTS[name].format(**values)
