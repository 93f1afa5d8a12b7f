// What scrolls sideways can be reached by keyboard.
function reachable() {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .output, .output .mlserve"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
}
addEventListener("load", reachable);
addEventListener("resize", reachable);
